/* The device is detached while a transfer is under way.
 * finds: dma/not-attached */
#include "edu.h"

enum { IOVA = 0x100000, LEN = 4096 };

int main(void) {
    open_edu();
    uint32_t ioas = new_ioas();
    attach(ioas);
    IOAS_MAP(ioas, pages(LEN), IOVA, LEN, READABLE | WRITEABLE); /* HERE */
    start(TO_MEMORY, IOVA, LEN);
#ifdef FIXED_TWIN
    wait_for_it();
#endif
    detach();
    wait_for_it();
    return 0;
}
