//! Listings of two directories of the test's own.

use super::*;

#[test]
fn a_listing_has_the_names_and_types_of_both_sides() {
    let both = tempfile::tempdir().unwrap();
    let (host, machine) = (both.path().join("host"), both.path().join("machine"));
    std::fs::create_dir_all(host.join("directory")).unwrap();
    std::fs::create_dir_all(machine.join("directory")).unwrap();
    std::fs::write(host.join("file"), "text").unwrap();
    let listings = Listings::default();
    let make = || listings.make(&host, &machine, |path| path.ends_with("node")).unwrap();
    assert_eq!(make(), None);

    std::fs::write(machine.join("node"), "").unwrap();
    std::os::unix::fs::symlink("../x", machine.join("link")).unwrap();
    let listing = make().unwrap();
    let names: Vec<_> = entries(&listing).unwrap().into_iter().collect();
    let expected = [
        ("directory", FileType::Directory),
        ("file", FileType::RegularFile),
        ("link", FileType::Symlink),
        ("node", FileType::CharacterDevice),
    ];
    assert_eq!(names, expected.map(|(name, kind)| (OsString::from(name), kind)));
    assert_eq!(std::fs::read_link(listing.join("link")).unwrap(), Path::new("../x"));
    assert_eq!(listings.shown(&listing), Some(host.clone()));
    assert_eq!(listings.shown(&listing.join("a/b")), Some(host.join("a/b")));
    assert_eq!(listings.shown(&host), None);

    // As it was, the same; with another name, another.
    assert_eq!(make().unwrap(), listing);
    std::fs::write(host.join("new"), "").unwrap();
    let newer = make().unwrap();
    assert_ne!(newer, listing);
    assert!(newer.join("new").exists() && listing.join("node").symlink_metadata().is_ok());
    assert_eq!(listings.shown(&newer), Some(host));
}
