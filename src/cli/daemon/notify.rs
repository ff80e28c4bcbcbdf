//! Telling systemd how far the node is (sd_notify(3)): units of `Type=notify`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tells it, where the environment names a socket.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, state) {
        tracing::warn!(%error, "systemd cannot be told: {}", state.replace('\n', ", "));
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        // An address that is no file.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n18_systemd_is_told_by_file_or_abstract_address() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("nanite-test-{}", std::process::id());
        let path = dir.path().join("notify");
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (bound, named) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            send(&named, "READY=1").unwrap();
            let mut buffer = [0; 64];
            let length = bound.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
        assert!(send(OsStr::new("/none/there"), "READY=1").is_err());
    }
}
