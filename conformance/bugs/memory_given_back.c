/* The memory is unmapped from the program, but not from the device.
 * finds: dma/memory-gone */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

int main(void) {
    open_edu();
    uint32_t ioas = new_ioas();
    attach(ioas);
    void *buffer = pages(LEN);
    IOAS_MAP(ioas, buffer, IOVA, LEN, READABLE | WRITEABLE); /* HERE */
#ifndef FIXED_TWIN
    munmap(buffer, LEN);
#endif
    start(TO_MEMORY, IOVA, LEN);
    wait_for_it();
    return 0;
}
