use std::io::Write;

use proptest::prelude::*;

use super::*;

const CHUNK: u64 = 2 << 20;

fn file(len: u64) -> FileStorage {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    FileStorage::new(file, false).unwrap()
}

#[test]
fn unwritten_memory_reads_as_zeros_and_ranges_end_at_its_size() {
    let storage = MemoryStorage::new(CHUNK + 512).unwrap();
    let mut bytes = [0xaa; 512];
    storage.read_at(CHUNK, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 512]);
    assert!(storage.read_at(CHUNK + 1, &mut bytes).is_err());
    assert!(MemoryStorage::new(u64::MAX).is_err());
    assert!(storage.write_at(u64::MAX, &bytes).is_err());
    assert!(storage.discard(512, u64::MAX).is_err());
    assert_eq!(storage.lend(CHUNK + 512, 1, &mut |_| ()), None);
}

#[test]
fn a_truncated_file_gives_read_errors() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    let storage = FileStorage::new(file.try_clone().unwrap(), false).unwrap();
    file.set_len(4096).unwrap();
    storage.read_at(0, &mut [0; 4096]).unwrap();
    assert!(storage.read_at(2048, &mut [0; 4096]).is_err());
    assert_eq!(storage.len(), 8192);
}

#[test]
fn read_only_storage_refuses_every_change() {
    let mut named = tempfile::NamedTempFile::new().unwrap();
    named.write_all(&[7; 4096]).unwrap();
    let storages: [Box<dyn Storage>; 2] = [
        Box::new(FileStorage::open(named.path(), true).unwrap()),
        Box::new(MemoryStorage::read_only(&[7; 4096]).unwrap()),
    ];
    for storage in storages {
        assert!(storage.read_only());
        assert!(storage.write_at(0, &[0; 512]).is_err());
        assert!(storage.discard(0, 512).is_err());
        assert_eq!(storage.lend_mut(0, 512, &mut |_| ()), None);
        storage.flush().unwrap();
        let mut bytes = [0; 4096];
        storage.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Both kinds against a plain array, around the border of two chunks.
    #[test]
    fn storage_keeps_what_was_written_last(
        operations in prop::collection::vec((any::<u8>(), 0_u64..6144, 1_u64..4096), 1..20),
    ) {
        let base = CHUNK - 4096;
        let len = CHUNK + 8192;
        let storages: [Box<dyn Storage>; 2] =
            [Box::new(MemoryStorage::new(len).unwrap()), Box::new(file(len))];
        for storage in storages {
            let mut reference = vec![0_u8; 12288];
            for &(value, at, count) in &operations {
                let range = usize::try_from(at).unwrap()..usize::try_from(at + count).unwrap();
                if value % 4 == 0 {
                    storage.discard(base + at, count).unwrap();
                    reference[range].fill(0);
                } else {
                    reference[range.clone()].fill(value);
                    storage.write_at(base + at, &reference[range]).unwrap();
                }
            }
            let mut bytes = vec![0xee; reference.len()];
            storage.read_at(base, &mut bytes).unwrap();
            prop_assert_eq!(bytes, reference);
        }
    }
}
