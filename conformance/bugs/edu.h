/* The edu device through iommufd and a VFIO cdev, as small as it can be. What the tests look at, mapping and unmapping,
 * are macros: their lines are those of the program that uses them. Layouts: linux/vfio.h, linux/iommufd.h. */
#ifndef EDU_H
#define EDU_H

#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CALL(n) (';' << 8 | (n))

struct ioas_alloc { uint32_t size, flags, out_ioas_id; };
struct ioas_map { uint32_t size, flags, ioas_id, reserved; uint64_t user_va, length, iova; };
struct ioas_unmap { uint32_t size, ioas_id; uint64_t iova, length; };
struct bind { uint32_t argsz, flags; int32_t iommufd; uint32_t out_devid; };
struct attach { uint32_t argsz, flags, pt_id; };

enum { READABLE = 1 << 2, WRITEABLE = 1 << 1, FIXED = 1 << 0 };

#define IOAS_MAP(ioas, at, address, len, rights)                                                       \
    do {                                                                                               \
        struct ioas_map map = {sizeof map, FIXED | (rights), (ioas), 0, (uint64_t)(at), (len), (address)}; \
        if (ioctl(iommu, CALL(0x85), &map)) err(1, "IOMMU_IOAS_MAP");                                   \
    } while (0)

#define IOAS_UNMAP(ioas, address, len)                                                                 \
    do {                                                                                               \
        struct ioas_unmap unmap = {sizeof unmap, (ioas), (address), (len)};                            \
        if (ioctl(iommu, CALL(0x86), &unmap)) err(1, "IOMMU_IOAS_UNMAP");                               \
    } while (0)

static int iommu, device;

static inline uint32_t new_ioas(void) {
    struct ioas_alloc alloc = {sizeof alloc, 0, 0};
    if (ioctl(iommu, CALL(0x81), &alloc)) err(1, "IOMMU_IOAS_ALLOC");
    return alloc.out_ioas_id;
}

static inline void attach(uint32_t ioas) {
    struct attach to = {sizeof to, 0, ioas};
    if (ioctl(device, CALL(119), &to)) err(1, "VFIO_DEVICE_ATTACH_IOMMUFD_PT");
}

static inline void detach(void) {
    uint32_t from[2] = {sizeof from, 0};
    if (ioctl(device, CALL(120), from)) err(1, "VFIO_DEVICE_DETACH_IOMMUFD_PT");
}

/* The configuration space is region 7, BAR 0 region 0. */
static inline void open_edu(void) {
    uint16_t command = 0x6;
    iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    device = open("/dev/vfio/devices/vfio0", O_RDWR | O_CLOEXEC);
    if (iommu < 0 || device < 0) err(1, "open");
    struct bind to = {sizeof to, 0, iommu, 0};
    if (ioctl(device, CALL(118), &to)) err(1, "VFIO_DEVICE_BIND_IOMMUFD");
    if (pwrite(device, &command, 2, (7ll << 40) + 4) != 2) err(1, "command register");
}

static inline void *pages(size_t len) {
    void *at = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) err(1, "mmap");
    memset(at, 0x5a, len);
    return at;
}

static inline void write_register(uint64_t at, uint64_t value) {
    if (pwrite(device, &value, 8, at) != 8) err(1, "register");
}

enum { TO_DEVICE = 1, TO_MEMORY = 3 };

/* Starts a transfer between memory and the device's buffer; it takes 100 ms. */
static inline void start(int direction, uint64_t iova, uint64_t len) {
    write_register(direction == TO_MEMORY ? 0x88 : 0x80, iova);
    write_register(direction == TO_MEMORY ? 0x80 : 0x88, 0x40000);
    write_register(0x90, len);
    write_register(0x98, direction);
}

static inline void wait_for_it(void) {
    uint64_t command = 1;
    while (command & 1) {
        if (pread(device, &command, 8, 0x98) != 8) err(1, "register");
        usleep(2000);
    }
}

#endif
