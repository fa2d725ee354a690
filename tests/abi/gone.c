/* The library that tests/abi/library needs and that the loader cannot find. */
__attribute__((visibility("default"))) int arle_test_gone(void);
int arle_test_gone(void)
{
    return 0;
}
