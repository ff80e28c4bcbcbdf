//! Writing certificate and key files: whole or not at all, and never over another by accident.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// For keys: only the owner reads and writes.
pub(crate) const SECRET: u32 = 0o600;
/// For certificates: everybody may read.
pub(crate) const PUBLIC: u32 = 0o644;

/// Writes a file with this mode: under a temporary name first, so that nobody ever reads half of it. Replaces a file that is
/// there only when told so.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32, replace: bool) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let mut random = [0; 8];
    openssl::rand::rand_bytes(&mut random)?;
    // Begins with a dot, so that no store takes it for a certificate.
    let temporary = path.with_file_name(format!(".{name}.{:016x}", u64::from_be_bytes(random)));
    let written = write_new(&temporary, content, mode).and_then(|()| {
        if replace {
            return std::fs::rename(&temporary, path);
        }
        // A link fails when the name is taken; a rename would replace it.
        std::fs::hard_link(&temporary, path)?;
        std::fs::remove_file(&temporary)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Makes a directory that only its owner can enter, when there is none.
pub(crate) fn create_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn s03_a_file_is_replaced_only_when_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/a.pem");
        create_directory(path.parent().unwrap()).unwrap();
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        write(&path, b"one", SECRET, false).unwrap();
        assert_eq!(write(&path, b"two", SECRET, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        write(&path, b"three", SECRET, true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a.pem"], "temporary files are left");
    }

    #[test]
    fn s03_a_file_is_not_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link.pem"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert_eq!(write(&link, b"x", SECRET, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        write(&link, b"x", SECRET, true).unwrap();
        assert!(!target.exists());
    }
}
