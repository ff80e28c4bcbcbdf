//! The program on a terminal, as a person runs it. The terminal is a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};

use super::WAIT_TIMEOUT;

/// A program with its own terminal; it is killed when this is dropped.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    shown: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
    /// The number of bytes of `shown` before which [`wait_for`](Self::wait_for) does not search.
    seen: usize,
}

impl Terminal {
    /// Runs a command on a terminal of 100 columns.
    pub fn run(command: &Command) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        // It makes this the controlling terminal, so that keys send signals to the program.
        let mut wrapped = Command::new("setsid");
        wrapped.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            wrapped.current_dir(dir);
        }
        let child = wrapped.env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        drop(pty.slave);
        let keyboard = File::from(pty.master.try_clone().unwrap());
        let shown = Arc::new(Mutex::new(String::new()));
        let reader = std::thread::spawn({
            let shown = shown.clone();
            move || read(pty.master, &shown)
        });
        Self { child, keyboard, shown, reader, seen: 0 }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this text is shown, after the text of the previous wait.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let shown = self.shown.lock().unwrap().clone();
            if let Some(at) = shown[self.seen..].find(text) {
                self.seen += at + text.len();
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{text:?} was not shown within {WAIT_TIMEOUT:?}: {:?}",
                &shown[self.seen..]
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything that was shown so far.
    pub fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the program ends.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let ended = self.child.try_wait().unwrap();
            if let Some(status) = ended.filter(|_| self.reader.is_finished()) {
                return (status, self.shown());
            }
            assert!(Instant::now() < deadline, "did not end within {WAIT_TIMEOUT:?}: {:?}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn read(master: OwnedFd, shown: &Mutex<String>) {
    let mut screen = File::from(master);
    let (mut bytes, mut rest) = ([0; 4096], Vec::new());
    // A read fails when the program has ended.
    while let Ok(count @ 1..) = screen.read(&mut bytes) {
        rest.extend_from_slice(&bytes[..count]);
        // An incomplete character waits for its other bytes.
        let whole = match std::str::from_utf8(&rest) {
            Ok(_) => rest.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => rest.len(),
        };
        let text: Vec<u8> = rest.drain(..whole).collect();
        shown.lock().unwrap().push_str(&String::from_utf8_lossy(&text));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
