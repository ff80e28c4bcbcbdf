//! Passwords of users that setup makes: random, each in a file for its owner only, and told to the broker as a salted hash.

use std::path::{Path, PathBuf};

use openssl::base64::encode_block;
use openssl::hash::{MessageDigest, hash};
use zeroize::Zeroizing;

use crate::certs::files;
use crate::packet::Identity;

/// How many random bytes a password has.
const LENGTH: usize = 32;

/// Where the password of a node's user is.
pub(super) fn path(dir: &Path, node: &Identity) -> PathBuf {
    dir.join(format!("{node}.password"))
}

/// A new password, in a file of its own beside the one that it is for. Dropped before it is kept, it leaves nothing.
pub(super) struct NewPassword {
    text: Zeroizing<String>,
    written: PathBuf,
    path: PathBuf,
}

impl NewPassword {
    /// The password.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Gives the file its name: from now on this is the password.
    pub(super) fn keep(self) -> std::io::Result<()> {
        std::fs::rename(&self.written, &self.path)
    }
}

impl Drop for NewPassword {
    fn drop(&mut self) {
        // It has its name by now, or is of no use.
        let _ = std::fs::remove_file(&self.written);
    }
}

/// Makes a password for a file; one that is there is replaced only when told so.
pub(super) fn make(path: &Path, replace: bool) -> std::io::Result<NewPassword> {
    if !replace && path.symlink_metadata().is_ok() {
        return Err(std::io::ErrorKind::AlreadyExists.into());
    }
    let mut bytes = Zeroizing::new([0; LENGTH]);
    openssl::rand::rand_bytes(bytes.as_mut_slice())?;
    // Fit for a URL, too.
    let text = encode_block(bytes.as_slice()).replace('+', "-").replace('/', "_");
    let text = Zeroizing::new(text.trim_end_matches('=').to_owned());
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        files::create_directory(dir)?;
    }
    let written = path.with_extension("password.new");
    files::write(&written, format!("{}\n", text.as_str()).as_bytes(), files::SECRET, true)?;
    Ok(NewPassword { text, written, path: path.to_owned() })
}

/// The password as RabbitMQ keeps it (`rabbit_password_hashing_sha256`): four bytes of salt, and the SHA-256 of salt and password.
pub(super) fn salted_hash(password: &str) -> Result<String, openssl::error::ErrorStack> {
    let mut salt = [0; 4];
    openssl::rand::rand_bytes(&mut salt)?;
    with_salt(salt, password)
}

fn with_salt(salt: [u8; 4], password: &str) -> Result<String, openssl::error::ErrorStack> {
    let salted = Zeroizing::new([&salt, password.as_bytes()].concat());
    let digest = hash(MessageDigest::sha256(), &salted)?;
    Ok(encode_block(&[&salt, &*digest].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn n22_a_password_is_random_for_its_owner_only_and_not_replaced_by_accident() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("deep"), &Identity::agent("fred").unwrap());
        drop(make(&path, false).unwrap());
        assert!(!path.exists() && std::fs::read_dir(path.parent().unwrap()).unwrap().next().is_none());
        let first = make(&path, false).unwrap();
        let text = first.text().to_owned();
        first.keep().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(text.len() == 43 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        assert_eq!(make(&path, false).err().unwrap().kind(), std::io::ErrorKind::AlreadyExists);
        let second = make(&path, true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"), "the old one stays until then");
        assert_ne!(second.text(), text);
        second.keep().unwrap();
        assert_ne!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"));
    }

    #[test]
    fn n22_the_hash_is_the_brokers() {
        // The example of RabbitMQ's guide to passwords.
        let hash = with_salt([0x90, 0x8d, 0xc6, 0x0a], "test12").unwrap();
        assert_eq!(hash, "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR");
    }
}
