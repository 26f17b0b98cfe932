// Advice to the operating system about memory that a kernel is about to fill.
#pragma once
#include <cstdint>

namespace fasttune {

// Asks for huge pages behind the whole pages of [address, address + bytes). Only fresh memory gains: a
// gradient of 50257 x 768 then costs 75 page faults instead of 37,700. Does nothing where the system does not
// know the request; never fails.
void prefer_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace fasttune
