use super::driver::*;
use crate::nvme::spec::nvm;

#[test]
fn blocks_read_back_as_written_whatever_the_size_and_offset() {
    let mut driver = Driver::ready(8 << 20);
    for (i, blocks) in [1_u32, 7, 8, 9, 16, 17, 255, 2048, 4096].into_iter().enumerate() {
        let seed = u8::try_from(i).unwrap();
        let bytes = Driver::pattern(blocks as usize * 512, seed);
        for offset in [0_u64, 4, 512, 4092] {
            let at = BUFFERS + offset;
            driver.host.poke(at, &bytes);
            assert_eq!(driver.transfer(nvm::WRITE, 3, blocks, at).status, 0);
            driver.host.poke(at, &vec![0; bytes.len()]);
            assert_eq!(driver.transfer(nvm::READ, 3, blocks, at).status, 0);
            assert!(driver.host.peek(at, bytes.len()) == bytes, "{blocks} blocks at {offset}");
        }
    }
}
