//! What `stat` and `statx` show, laid out as the x86-64 ABI has it (`asm/stat.h`, `linux/stat.h`).

use lychgate_machine::Node;
use rustix::fs::Stat;

const S_IFMT: u32 = 0o170_000;
const S_IFCHR: u32 = 0o020_000;

/// `STATX_BASIC_STATS`.
const BASIC_STATS: u32 = 0x7ff;

/// Size of `struct stat`.
pub(crate) const STAT_LENGTH: usize = 144;
/// Size of `struct statx`.
pub(crate) const STATX_LENGTH: usize = 256;

/// Attributes of a file, as both calls give them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Attributes {
    device: u64,
    inode: u64,
    mode: u32,
    links: u64,
    user: u32,
    group: u32,
    node: u64,
    size: u64,
    block_size: u32,
    blocks: u64,
    /// Seconds and nanoseconds of the last access, modification and change.
    times: [(i64, u32); 3],
}

impl Attributes {
    /// Those of a real file.
    pub(crate) fn of(stat: &Stat) -> Self {
        let time =
            |seconds: i64, nanoseconds: u64| (seconds, u32::try_from(nanoseconds).unwrap_or(0));
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            links: stat.st_nlink,
            user: stat.st_uid,
            group: stat.st_gid,
            node: stat.st_rdev,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            block_size: u32::try_from(stat.st_blksize).unwrap_or(4096),
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
            times: [
                time(stat.st_atime, stat.st_atime_nsec),
                time(stat.st_mtime, stat.st_mtime_nsec),
                time(stat.st_ctime, stat.st_ctime_nsec),
            ],
        }
    }

    /// Type and permissions, as `st_mode` has them.
    pub(crate) const fn mode(&self) -> u32 {
        self.mode
    }

    /// The same file as a character device.
    pub(crate) fn as_node(self, node: Node) -> Self {
        Self {
            mode: S_IFCHR | (node.mode & !S_IFMT),
            node: rustix::fs::makedev(node.major, node.minor),
            size: 0,
            blocks: 0,
            ..self
        }
    }

    /// The same file as a character device of this number, or as an anonymous inode, which has no
    /// type.
    pub(crate) fn as_open_file(self, number: Option<(u32, u32)>) -> Self {
        match number {
            Some((major, minor)) => self.as_node(Node { major, minor, mode: 0o600 }),
            None => Self { mode: 0o600, node: 0, size: 0, blocks: 0, ..self },
        }
    }

    /// `struct stat`.
    pub(crate) fn stat(&self) -> [u8; STAT_LENGTH] {
        let mut out = Writer::new();
        out.u64(0, self.device);
        out.u64(8, self.inode);
        out.u64(16, self.links);
        out.u32(24, self.mode);
        out.u32(28, self.user);
        out.u32(32, self.group);
        out.u64(40, self.node);
        out.u64(48, self.size);
        out.u64(56, u64::from(self.block_size));
        out.u64(64, self.blocks);
        for (at, (seconds, nanoseconds)) in [72, 88, 104].into_iter().zip(self.times) {
            out.u64(at, seconds.cast_unsigned());
            out.u64(at + 8, u64::from(nanoseconds));
        }
        out.0
    }

    /// `struct statx` with the basic fields, whatever was asked for.
    pub(crate) fn statx(&self) -> [u8; STATX_LENGTH] {
        let mut out = Writer::new();
        out.u32(0, BASIC_STATS);
        out.u32(4, self.block_size);
        out.u32(16, u32::try_from(self.links).unwrap_or(u32::MAX));
        out.u32(20, self.user);
        out.u32(24, self.group);
        out.u16(28, u16::try_from(self.mode & 0xffff).unwrap_or(0));
        out.u64(32, self.inode);
        out.u64(40, self.size);
        out.u64(48, self.blocks);
        // Access, birth (not given), change, modification.
        let [access, modification, change] = self.times;
        for (at, (seconds, nanoseconds)) in [(64, access), (96, change), (112, modification)] {
            out.u64(at, seconds.cast_unsigned());
            out.u32(at + 8, nanoseconds);
        }
        out.u32(128, rustix::fs::major(self.node));
        out.u32(132, rustix::fs::minor(self.node));
        out.u32(136, rustix::fs::major(self.device));
        out.u32(140, rustix::fs::minor(self.device));
        out.0
    }
}

/// A zeroed structure that is filled by offset.
struct Writer<const N: usize>([u8; N]);

impl<const N: usize> Writer<N> {
    const fn new() -> Self {
        Self([0; N])
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}
