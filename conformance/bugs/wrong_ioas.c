/* The device moves to another IOAS, and a transfer under way names an address of the old one.
 * finds: dma/never-mapped */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

int main(void) {
    open_edu();
    uint32_t old = new_ioas(), new = new_ioas();
    attach(old);
    IOAS_MAP(old, pages(LEN), IOVA, LEN, READABLE | WRITEABLE);
    IOAS_MAP(new, pages(LEN), IOVA + 0x10000, LEN, READABLE | WRITEABLE);
    start(TO_MEMORY, IOVA, LEN);
#ifdef FIXED_TWIN
    wait_for_it();
#endif
    attach(new);
    wait_for_it();
    return 0;
}
