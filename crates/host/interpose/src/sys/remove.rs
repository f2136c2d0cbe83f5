//! Removal of a directory by system calls alone, for processes that may do nothing else.

use std::ffi::CStr;
use std::os::fd::RawFd;

use libc::c_char;

/// How deep directories are removed; what is deeper stays.
const DEPTH: u32 = 64;

/// Removes `path` with everything in it. No link is followed, `path` itself included; what cannot be
/// removed stays. Allocates nothing.
pub(super) fn remove(path: &CStr) {
    // SAFETY: a string that ends with 0.
    unsafe { remove_at(libc::AT_FDCWD, path.as_ptr(), DEPTH) };
}

/// Removes `name` in `parent`; whether it is gone.
///
/// # Safety
/// `name` must point to a string that ends with 0.
unsafe fn remove_at(parent: RawFd, name: *const c_char, depth: u32) -> bool {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: by this function's contract.
    unsafe {
        let directory = libc::openat(parent, name, flags);
        if directory < 0 {
            return libc::unlinkat(parent, name, 0) == 0;
        }
        // A directory that changes under `getdents64` may hide entries, so it is read anew until it
        // has none, or none that goes.
        while depth > 0 && remove_entries(directory, depth - 1) {
            libc::lseek(directory, 0, libc::SEEK_SET);
        }
        libc::close(directory);
        libc::unlinkat(parent, name, libc::AT_REMOVEDIR) == 0
    }
}

/// Removes what is in `directory` from its position on; whether anything went.
///
/// # Safety
/// `directory` must be open.
unsafe fn remove_entries(directory: RawFd, depth: u32) -> bool {
    let mut entries = [0_u8; 1024];
    let mut went = false;
    loop {
        // SAFETY: a buffer of this frame with its length.
        let length = unsafe {
            libc::syscall(libc::SYS_getdents64, directory, entries.as_mut_ptr(), entries.len())
        };
        let Some(mut rest) = usize::try_from(length).ok().and_then(|n| entries.get(..n)) else {
            return went;
        };
        if rest.is_empty() {
            return went;
        }
        while let Some(name) = next_name(&mut rest) {
            let Ok(name) = CStr::from_bytes_until_nul(name) else { continue };
            if name != c"." && name != c".." {
                // SAFETY: a string that ends with 0.
                went |= unsafe { remove_at(directory, name.as_ptr(), depth) };
            }
        }
    }
}

/// Cuts the next entry of a directory off; gives its name with what follows it
/// (`struct linux_dirent64`: `d_ino` 8, `d_off` 8, `d_reclen` 2, `d_type` 1, `d_name`).
pub(super) fn next_name<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::from(u16::from_le_bytes([*rest.get(16)?, *rest.get(17)?]));
    let name = rest.get(19..length)?;
    *rest = rest.get(length..)?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn remove_path(path: &Path) {
        remove(&CString::new(path.as_os_str().as_bytes()).unwrap());
    }

    #[test]
    fn a_tree_goes_and_what_its_links_lead_to_stays() {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("kept")).unwrap();
        fs::write(outside.path().join("kept/file"), "kept").unwrap();
        let root = outside.path().join("root");
        let mut at = root.clone();
        for level in 0..20 {
            fs::create_dir(&at).unwrap();
            // More than one buffer of names.
            for number in 0..100 {
                fs::write(at.join(format!("a-file-with-a-longer-name-{number}")), "").unwrap();
            }
            symlink(outside.path().join("kept"), at.join("directory")).unwrap();
            symlink(outside.path().join("kept/file"), at.join("file")).unwrap();
            symlink("missing", at.join("dangling")).unwrap();
            at = at.join(format!("level{level}"));
        }
        remove_path(&root);
        assert!(!root.exists());
        assert_eq!(fs::read_to_string(outside.path().join("kept/file")).unwrap(), "kept");
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("kept")).unwrap();
        fs::write(outside.path().join("kept/file"), "kept").unwrap();
        let link = outside.path().join("link");
        symlink("kept", &link).unwrap();
        remove_path(&link);
        assert!(fs::symlink_metadata(&link).is_err());
        assert!(outside.path().join("kept/file").exists());
        remove_path(&outside.path().join("missing"));
    }

    #[test]
    fn what_is_too_deep_stays_and_ends_the_removal() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        let deep = (0..DEPTH + 8).fold(root.clone(), |at, _| at.join("d"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(root.join("file"), "").unwrap();
        remove_path(&root);
        assert!(deep.exists() && !root.join("file").exists());
    }
}
