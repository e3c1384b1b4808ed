// The same source with other flags.
#include "isa/avx512vnni.cpp"
