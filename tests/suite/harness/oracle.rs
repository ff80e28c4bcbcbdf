//! The independent reader and writer of the envelope (`tests/oracle/envelope.py`), and the `openssl` program.
//!
//! The Python packages are in a virtual environment under Cargo's directory for tests, which is created when it is missing.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nanite::certs::Credentials;
use tempfile::TempDir;

const ORACLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle");

/// Runs the oracle with these arguments; returns its output, or its error message.
pub fn oracle(arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, String> {
    let script = format!("{ORACLE}/envelope.py");
    let output = run(Command::new(python()).arg("-B").arg(script).args(arguments), input);
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Runs the `openssl` program in a directory; it must succeed.
pub fn openssl(dir: &Path, arguments: &str) {
    let output = run(Command::new("openssl").args(arguments.split_whitespace()).current_dir(dir), b"");
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    // A program may end before it has read all its input; its output says why.
    let _ = writer.join().unwrap();
    output
}

/// The Python interpreter of an environment with the oracle's requirements.
fn python() -> PathBuf {
    let requirements = format!("{ORACLE}/requirements.txt");
    let digest = openssl::sha::sha256(&fs::read(&requirements).unwrap());
    let environment = create_once("oracle", &digest, |environment| {
        succeed(Command::new("python3").args(["-m", "venv", "--clear"]).arg(environment));
        let python = environment.join("bin/python");
        succeed(Command::new(python).args(["-m", "pip", "install", "--quiet", "-r", &requirements]));
    });
    environment.join("bin/python")
}

/// A directory under Cargo's directory for tests, created when it is missing or the requirements have changed.
fn create_once(name: &str, requirements: &[u8; 32], make: impl FnOnce(&Path)) -> PathBuf {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [a, b, c, d, ..] = requirements;
    let directory = base.join(format!("{name}-{a:02x}{b:02x}{c:02x}{d:02x}"));
    let ready = directory.join("ready");
    fs::create_dir_all(base).unwrap();
    // Tests may run in separate processes: one creates it, the others wait.
    let lock = File::create(base.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    if !ready.exists() {
        make(&directory);
        File::create(&ready).unwrap();
    }
    directory
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Extracts NIST's Public Key Interoperability Test Suite from the Python package that contains it.
#[cfg(feature = "fuzzing")]
const UNPACK: &str = "
import glob, sys, zipfile
[wheel] = glob.glob(sys.argv[1] + '/*.whl')
inside = zipfile.ZipFile(wheel)
for name in inside.namelist():
    if '/PKITS_data/smime/' in name or name.endswith('/PKITS_data/certs/TrustAnchorRootCertificate.crt'):
        inside.extract(name, sys.argv[1])
";

/// The directory with NIST's Public Key Interoperability Test Suite: `certs` and `smime`.
#[cfg(feature = "fuzzing")]
pub fn pkits() -> PathBuf {
    let requirements = format!("{ORACLE}/pkits.txt");
    let digest = openssl::sha::sha256(&fs::read(&requirements).unwrap());
    let python = python();
    let directory = create_once("pkits", &digest, |directory| {
        let _ = fs::remove_dir_all(directory);
        let download = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r", &requirements, "-d"];
        succeed(Command::new(&python).args(download).arg(directory));
        succeed(Command::new(&python).args(["-c", UNPACK]).arg(directory));
        for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|extension| extension == "whl") {
                fs::remove_file(entry).unwrap();
            }
        }
    });
    directory.join("cryptography_vectors/x509/PKITS_data")
}

/// Certificates and keys in a temporary directory.
pub struct Files(TempDir);

impl Files {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> String {
        self.dir().join(name).to_str().unwrap().to_owned()
    }

    /// Writes `NAME.pem` and `NAME-key.pem`.
    pub fn put(&self, name: &str, credentials: &Credentials) {
        fs::write(self.path(&format!("{name}.pem")), credentials.certificate().to_pem()).unwrap();
        fs::write(self.path(&format!("{name}-key.pem")), credentials.key().to_pem().unwrap()).unwrap();
    }
}
