//! Lines of `/proc/PID/maps`, and this process as its own client.

use super::*;

#[test]
fn a_line_of_maps_is_understood() {
    let vma = parse("7f0000001000-7f0000003000 rw-s 00002000 00:01 1046     /memfd:a b (deleted)");
    let expected = Vma {
        start: 0x7f00_0000_1000,
        end: 0x7f00_0000_3000,
        read: true,
        write: true,
        shared: true,
        offset: 0x2000,
        file: Some((rustix::fs::makedev(0, 1), 1046)),
        name: "/memfd:a b (deleted)".to_owned(),
    };
    assert_eq!(vma, Some(expected));
    let vma = parse("00400000-00401000 r-xp 00000000 00:00 0 ").unwrap();
    assert_eq!((vma.file, vma.name.as_str(), vma.write, vma.shared), (None, "", false, false));
    for bad in ["", "x", "1-2", "1-2 rw-p", "1-2 rw-p 0 0:0 x"] {
        assert_eq!(parse(bad), None);
    }
}

#[test]
fn a_query_finds_what_the_text_of_maps_says() {
    let space = Space::open(std::process::id()).unwrap();
    let memory = rustix::fs::memfd_create("queried", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 8192).unwrap();
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    // SAFETY: a new mapping where the kernel likes, which nothing reaches.
    let at = unsafe {
        let null = std::ptr::null_mut();
        mmap(null, 4096, ProtFlags::READ, MapFlags::SHARED, &memory, 4096).unwrap()
    };
    let start = at.addr() as u64;
    let text = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = text.lines().filter_map(parse).find(|vma| vma.start == start).unwrap();
    assert!(line.name.starts_with("/memfd:queried") && line.shared && !line.write);
    match space.query(start, start + 4096).unwrap() {
        Some(vmas) => assert_eq!(vmas, [line]),
        // Before Linux 6.11.
        None => assert!(process::kernel_version() < Some((6, 11))),
    }
    // SAFETY: the mapping made above.
    unsafe { munmap(at, 4096).unwrap() };
}

#[test]
fn scattered_memory_is_gathered_and_scattered_again() {
    let space = Space::open(std::process::id()).unwrap();
    let pages: Vec<Vec<u8>> = (0..2500_u32).map(|page| vec![page.to_le_bytes()[0]; 16]).collect();
    let spans: Vec<Span> = pages
        .iter()
        .map(|page| Span { start: page.as_ptr().addr() as u64, len: page.len() })
        .collect();
    let mut bytes = vec![0; 2500 * 16];
    space.read(&spans, &mut bytes).unwrap();
    assert_eq!(bytes, pages.concat());
    // By the file alone, as after an exec.
    space.suspect();
    bytes.fill(0);
    space.read(&spans, &mut bytes).unwrap();
    assert_eq!(bytes, pages.concat());
    assert_eq!(space.read(&[Span { start: 8, len: 8 }], &mut [0; 8]), Err(Unreachable));
    assert_eq!(space.read(&[Span { start: 8, len: 8 }], &mut [0; 4]), Err(Unreachable));
    assert_eq!(space.write(&[Span { start: u64::MAX, len: 8 }], &[0; 8]), Err(Unreachable));
}

#[test]
fn mappings_and_their_files_are_found() {
    let space = Space::open(std::process::id()).unwrap();
    let memory = rustix::fs::memfd_create("found", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 8192).unwrap();
    // Found by its file, because nothing of it is mapped.
    let stat = rustix::fs::fstat(&memory).unwrap();
    let vma = Vma {
        start: 0,
        end: 8192,
        read: true,
        write: true,
        shared: true,
        offset: 0,
        file: Some((stat.st_dev, stat.st_ino)),
        name: String::new(),
    };
    let found = space.open_file(&vma).unwrap();
    assert_eq!(rustix::fs::fstat(&found).unwrap().st_ino, stat.st_ino);
    assert!(space.open_file(&Vma { shared: false, ..vma.clone() }).is_none());
    assert!(space.open_file(&Vma { file: Some((1, 1)), ..vma }).is_none());

    let local = 0_u64;
    let at = std::ptr::from_ref(&local).addr() as u64;
    let vmas = space.vmas(at, 8).unwrap();
    assert_eq!(vmas.len(), 1);
    assert!(vmas[0].start <= at && vmas[0].end > at && vmas[0].write);
    assert!(space.vmas(0, 4096).unwrap().is_empty());
}

#[test]
fn a_process_that_ended_is_unreachable() {
    let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    let space = Space::open(child.id()).unwrap();
    let text = space.vmas(0, u64::MAX).unwrap();
    let first = text.first().unwrap().start;
    let spans = [Span { start: first, len: 16 << 10 }, Span { start: first, len: 16 }];
    assert!(!space.is_gone());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(space.is_gone());
    assert!(!space.is_current(first));
    assert_eq!(space.read(&spans, &mut vec![0; (16 << 10) + 16]), Err(Unreachable));
    assert_eq!(space.vmas(0, u64::MAX), Err(Unreachable));
}
