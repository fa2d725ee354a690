/* The cases belong to the conformance kit, which is part of arle; tests find them here. */
#include "plugin/ops_cases.h"
