/* The classic: the buffer is given back before the device has done with it.
 * finds: dma/use-after-unmap */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

static uint32_t ioas;

static void alloc_ring(void) {
    IOAS_MAP(ioas, pages(LEN), IOVA, LEN, READABLE | WRITEABLE);
}

static void free_ring(void) {
    IOAS_UNMAP(ioas, IOVA, LEN); /* HERE */
}

int main(void) {
    open_edu();
    ioas = new_ioas();
    attach(ioas);
    alloc_ring();
    start(TO_MEMORY, IOVA, LEN);
#ifdef FIXED_TWIN
    wait_for_it();
#endif
    free_ring();
    wait_for_it();
    return 0;
}
