/* The transfer begins in the mapping and ends behind it: the length was counted from the wrong place.
 * finds: dma/never-mapped */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096, HEADER = 64 };

int main(void) {
    open_edu();
    uint32_t ioas = new_ioas();
    attach(ioas);
    IOAS_MAP(ioas, pages(LEN), IOVA, LEN, READABLE | WRITEABLE);
#ifdef FIXED_TWIN
    start(TO_DEVICE, IOVA + HEADER, LEN - HEADER);
#else
    start(TO_DEVICE, IOVA + HEADER, LEN);
#endif
    wait_for_it();
    return 0;
}
