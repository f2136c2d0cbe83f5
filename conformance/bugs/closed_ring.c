/* Two buffers, and the wrong one of them is given back: an index that was advanced once too often.
 * finds: dma/use-after-unmap */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 8192, SLOTS = 2 };

static uint32_t ioas;
static unsigned done;

static uint64_t slot(unsigned n) {
    return IOVA + (uint64_t)(n % SLOTS) * LEN;
}

static void retire(void) {
#ifdef FIXED_TWIN
    IOAS_UNMAP(ioas, slot(done++), LEN);
#else
    IOAS_UNMAP(ioas, slot(++done), LEN); /* HERE */
#endif
}

int main(void) {
    open_edu();
    ioas = new_ioas();
    attach(ioas);
    for (unsigned n = 0; n < SLOTS; n++) IOAS_MAP(ioas, pages(LEN), slot(n), LEN, READABLE | WRITEABLE);
    start(TO_MEMORY, slot(0), 4096);
    wait_for_it();
    start(TO_MEMORY, slot(1) + 4096, 4096);
    retire();
    wait_for_it();
    return 0;
}
