/* A read from the device writes to memory: the mapping has the rights of the other direction.
 * finds: dma/no-right */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

int main(void) {
    open_edu();
    uint32_t ioas = new_ioas();
    attach(ioas);
#ifdef FIXED_TWIN
    int rights = READABLE | WRITEABLE;
#else
    int rights = READABLE;
#endif
    IOAS_MAP(ioas, pages(LEN), IOVA, LEN, rights); /* HERE */
    start(TO_MEMORY, IOVA, LEN);
    wait_for_it();
    return 0;
}
