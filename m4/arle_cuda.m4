# Finds nvcc, the runtime and cuBLASLt. Sets enable_backend_cuda to yes or no and substitutes NVCC, CUDA_DIR,
# CUDA_CPPFLAGS, CUDA_LIBS and CUDA_GENCODE. A toolkit that was asked for and is not there is an error; auto skips it.
AC_DEFUN([ARLE_FIND_CUDA], [
CUDA_DIR= NVCC= CUDA_GENCODE=
AS_IF([test "x$with_cuda" = xno || test "x$enable_backend_cuda" = xno], [enable_backend_cuda=no], [
    AS_IF([test "x$with_cuda" = xauto || test "x$with_cuda" = xyes],
        [AC_PATH_PROG([NVCC], [nvcc], [], [$PATH:/usr/local/cuda/bin])],
        [AC_PATH_PROG([NVCC], [nvcc], [], [$with_cuda/bin])])
    AS_IF([test -n "$NVCC"], [
        CUDA_DIR=`cd "\`dirname "$NVCC"\`/.." && pwd -P`
        AS_IF([test "x$enable_backend_cuda" = xauto], [enable_backend_cuda=yes])
        arle_cuda_want=`echo "$with_cuda_arch" | tr , ' '`
        AS_IF([test "x$with_cuda_arch" = xauto], [arle_cuda_want="80 90a 100"])
        arle_cuda_known=`"$NVCC" --list-gpu-arch 2>/dev/null | tr '\n' ' '`
        for a in $arle_cuda_want; do
            n=`echo $a | tr -d a`
            case " $arle_cuda_known " in
                *" compute_$n "*) CUDA_GENCODE="$CUDA_GENCODE -gencode=arch=compute_$a,code=sm_$a" ;;
            esac
        done
        AC_MSG_NOTICE([CUDA in $CUDA_DIR, architectures:$CUDA_GENCODE])
    ], [
        AS_IF([test "x$with_cuda" != xauto || test "x$enable_backend_cuda" = xyes],
            [AC_MSG_ERROR([nvcc not found; give --with-cuda=DIR or --without-cuda])])
        enable_backend_cuda=no
    ])
])
AC_SUBST([NVCC])
AC_SUBST([CUDA_DIR])
AC_SUBST([CUDA_GENCODE])
CUDA_CPPFLAGS="-I$CUDA_DIR/include"
CUDA_LIBS="-L$CUDA_DIR/lib64 -lcudart -lcublasLt"
AC_SUBST([CUDA_CPPFLAGS])
AC_SUBST([CUDA_LIBS])
])
