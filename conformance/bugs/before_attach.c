/* The device is started before it is attached to the IOAS that holds its buffer.
 * finds: dma/not-attached */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

int main(void) {
    open_edu();
    uint32_t ioas = new_ioas();
    IOAS_MAP(ioas, pages(LEN), IOVA, LEN, READABLE | WRITEABLE);
#ifdef FIXED_TWIN
    attach(ioas);
#endif
    start(TO_MEMORY, IOVA, LEN);
    wait_for_it();
    return 0;
}
