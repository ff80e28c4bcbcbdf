//! Which files may be run: owner, permissions, symbolic links and format.
//!
//! Anyone who can write a file decides what runs. So every directory from the root of the file system to the program, and the program
//! itself, must belong to root or to the user of this process, and must not be writable by others. A symbolic link is followed step
//! by step, inside the program directory only.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

/// The most symbolic links followed on the way to one program.
const MAX_SYMLINKS: usize = 8;
/// Write permission for the group and for others.
const GROUP_OR_OTHERS_WRITE: u32 = 0o022;
/// In a sticky directory only the owner of a file can rename or remove it.
const STICKY: u32 = 0o1000;

/// The first bytes of files that the kernel runs itself. The C library would pass any other file to a shell.
const EXECUTABLE_MAGIC: &[&[u8]] = if cfg!(target_vendor = "apple") {
    &[b"#!", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"]
} else {
    &[b"#!", b"\x7fELF"]
};

/// An entry of the program directory that is not offered as a service.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// The entry, or the directory or link target that is the reason.
    pub path: PathBuf,
    /// Why it is not offered.
    pub reason: SkipReason,
}

impl Skipped {
    pub(super) fn new(path: &Path, reason: SkipReason) -> Self {
        Self { path: path.to_owned(), reason }
    }

    pub(super) fn unreadable(path: &Path, error: &io::Error) -> Self {
        Self::new(path, SkipReason::Unreadable(error.kind()))
    }
}

/// Why an entry of the program directory is not offered as a service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SkipReason {
    /// The name cannot be part of a service name.
    #[error("the name is too long, or has characters other than letters, digits, '-', '_' and '.'")]
    InvalidName,
    /// The group or others may write it.
    #[error("writable by other users, who could decide what runs (chmod go-w)")]
    WritableByOthers,
    /// It belongs to another user.
    #[error("owned by user {0}, not by root or the user of this process")]
    WrongOwner(u32),
    /// It is a symbolic link that leaves the program directory, loops, or has too many steps.
    #[error("a symbolic link that does not stay inside the program directory")]
    SymlinkOutside,
    /// It is a file beside the prefixes: a program is DIR/PREFIX/NAME.
    #[error("not a directory: a program is DIR/PREFIX/NAME")]
    NotADirectory,
    /// It is a directory, a device, or the like.
    #[error("not a regular file")]
    NotAFile,
    /// This process may not execute it.
    #[error("not executable by this process")]
    NotExecutable,
    /// It is neither a script with an interpreter line nor an executable of this system.
    #[error("neither a script that begins with #! nor an executable of this system")]
    UnknownFormat,
    /// There are more programs than one agent may offer, or more entries than are scanned.
    #[error("too many entries")]
    TooMany,
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(io::ErrorKind),
}

/// Why a program directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// It is not a directory that this process can read.
    #[error("cannot read the program directory {}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Other users could decide what runs.
    #[error("{} is not safe for programs: {reason}", path.display())]
    Unsafe {
        /// The directory, or one above it.
        path: PathBuf,
        /// What is wrong with it.
        reason: SkipReason,
    },
    /// A prefix cannot be part of a service name.
    #[error("{0:?} is not a valid service prefix")]
    InvalidPrefix(String),
    /// The directory of a prefix does not exist.
    #[error("no directory {prefix} in {}", path.display())]
    NoSuchPrefix {
        /// The prefix.
        prefix: String,
        /// The program directory.
        path: PathBuf,
    },
    /// The thread that watches the directory cannot be started.
    #[error("cannot watch the program directory")]
    Watch(#[source] io::Error),
}

impl SkipReason {
    /// Whether it is normal for a file that was never meant to be a program, such as a README.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, SkipReason::NotADirectory | SkipReason::NotAFile | SkipReason::NotExecutable)
    }
}

/// A program directory whose own path has been checked.
#[derive(Debug)]
pub(super) struct ProgramRoot {
    /// Without symbolic links.
    pub path: PathBuf,
    /// The user of this process.
    user: u32,
}

impl ProgramRoot {
    /// Checks `dir` and the directories above it. Blocks on the file system.
    pub fn open(dir: &Path) -> Result<Self, ProgramError> {
        let unreadable = |source| ProgramError::Unreadable { path: dir.to_owned(), source };
        let path = dir.canonicalize().map_err(unreadable)?;
        let user = rustix::process::geteuid().as_raw();
        for ancestor in path.ancestors() {
            let meta = fs::symlink_metadata(ancestor).map_err(unreadable)?;
            check_write_access(&meta, user, ancestor != path)
                .map_err(|reason| ProgramError::Unsafe { path: ancestor.to_owned(), reason })?;
        }
        fs::read_dir(&path).map_err(unreadable)?;
        Ok(Self { path, user })
    }

    /// Whether a program may be run now. Blocks on the file system.
    pub fn check_program(&self, program: &Path) -> Result<(), Skipped> {
        let (real, meta) = self.resolve(program)?;
        if !meta.is_file() {
            return Err(Skipped::new(&real, SkipReason::NotAFile));
        }
        if accessat(CWD, &real, Access::EXEC_OK, AtFlags::EACCESS).is_err() {
            return Err(Skipped::new(&real, SkipReason::NotExecutable));
        }
        match has_executable_format(&real) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Skipped::new(&real, SkipReason::UnknownFormat)),
            Err(error) => Err(Skipped::unreadable(&real, &error)),
        }
    }

    /// The real path of a prefix's directory.
    pub fn resolve_directory(&self, path: &Path) -> Result<PathBuf, Skipped> {
        let (real, meta) = self.resolve(path)?;
        if meta.is_dir() { Ok(real) } else { Err(Skipped::new(path, SkipReason::NotADirectory)) }
    }

    /// Follows a path below the root, including symbolic links, and checks every step. Returns the real path and its metadata.
    fn resolve(&self, path: &Path) -> Result<(PathBuf, Metadata), Skipped> {
        let outside = || Skipped::new(path, SkipReason::SymlinkOutside);
        let below_root = |path: &Path| -> Option<VecDeque<OsString>> {
            Some(path.strip_prefix(&self.path).ok()?.iter().map(OsStr::to_owned).collect())
        };
        let mut remaining = below_root(path).ok_or_else(outside)?;
        let mut current = self.path.clone();
        let mut meta = metadata(&current)?;
        self.check(&current, &meta)?;
        let mut symlinks = 0;
        while let Some(step) = remaining.pop_front() {
            match Path::new(&step).components().next() {
                Some(Component::ParentDir) if current != self.path => {
                    current.pop();
                }
                Some(Component::CurDir) => {}
                Some(Component::Normal(name)) => current.push(name),
                _ => return Err(outside()),
            }
            meta = metadata(&current)?;
            if !meta.is_symlink() {
                self.check(&current, &meta)?;
                continue;
            }
            symlinks += 1;
            if symlinks > MAX_SYMLINKS {
                return Err(outside());
            }
            let target = fs::read_link(&current).map_err(|error| Skipped::unreadable(&current, &error))?;
            current.pop();
            let mut steps = if target.is_absolute() {
                current.clone_from(&self.path);
                below_root(&target).ok_or_else(outside)?
            } else {
                target.iter().map(OsStr::to_owned).collect()
            };
            steps.append(&mut remaining);
            remaining = steps;
        }
        Ok((current, meta))
    }

    fn check(&self, path: &Path, meta: &Metadata) -> Result<(), Skipped> {
        check_write_access(meta, self.user, false).map_err(|reason| Skipped::new(path, reason))
    }
}

/// Metadata of the path itself, also if it is a symbolic link.
fn metadata(path: &Path) -> Result<Metadata, Skipped> {
    fs::symlink_metadata(path).map_err(|error| Skipped::unreadable(path, &error))
}

/// Whether only root and `user` may write it. Others may write into a sticky directory, if allowed: they cannot replace our files.
fn check_write_access(meta: &Metadata, user: u32, allow_sticky: bool) -> Result<(), SkipReason> {
    if meta.uid() != 0 && meta.uid() != user {
        return Err(SkipReason::WrongOwner(meta.uid()));
    }
    if meta.mode() & GROUP_OR_OTHERS_WRITE != 0 && !(allow_sticky && meta.mode() & STICKY != 0) {
        return Err(SkipReason::WritableByOthers);
    }
    Ok(())
}

/// Whether the kernel itself runs such a file. A file that may be executed but not read cannot be a script: the kernel decides.
fn has_executable_format(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(4).read_to_end(&mut start)?,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
        Err(error) => return Err(error),
    };
    Ok(EXECUTABLE_MAGIC.iter().any(|magic| start.starts_with(magic)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use tempfile::TempDir;

    use super::*;

    pub const SCRIPT: &str = "#!/bin/sh\n";

    pub fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    pub fn program_dir() -> TempDir {
        let dir = TempDir::new().unwrap();
        set_mode(dir.path(), 0o755);
        dir
    }

    /// Writes a file, and creates its parent directories with mode 0755, whatever the umask is.
    pub fn write(dir: &TempDir, name: &str, text: &str, mode: u32) -> PathBuf {
        let root = dir.path().canonicalize().unwrap();
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for directory in path.ancestors().skip(1).take_while(|directory| *directory != root) {
            set_mode(directory, 0o755);
        }
        fs::write(&path, text).unwrap();
        set_mode(&path, mode);
        path
    }

    fn open(dir: &TempDir) -> ProgramRoot {
        ProgramRoot::open(dir.path()).unwrap()
    }

    #[test]
    fn rejects_what_is_writable_by_others() {
        let dir = program_dir();
        let group_writable = write(&dir, "text/group", SCRIPT, 0o775);
        let world_writable = write(&dir, "text/all", SCRIPT, 0o757);
        let in_shared_directory = write(&dir, "open/program", SCRIPT, 0o755);
        let shared = in_shared_directory.parent().unwrap();
        let root = open(&dir);
        let refused = |path: &Path| Err(Skipped::new(path, SkipReason::WritableByOthers));
        assert_eq!(root.check_program(&group_writable), refused(&group_writable));
        assert_eq!(root.check_program(&world_writable), refused(&world_writable));
        assert_eq!(root.check_program(&in_shared_directory), Ok(()));
        for mode in [0o777, 0o1777] {
            set_mode(shared, mode);
            assert_eq!(root.check_program(&in_shared_directory), refused(shared));
            assert_eq!(root.resolve_directory(shared), Err(Skipped::new(shared, SkipReason::WritableByOthers)));
        }
    }

    #[test]
    fn rejects_what_another_user_owns() {
        let dir = program_dir();
        let path = write(&dir, "text/upper", SCRIPT, 0o755);
        let mut root = open(&dir);
        // Only root can give a file away; any other user pretends to be someone else.
        let (owner, refused) = if root.user == 0 {
            chown(&path, Some(65534), None).unwrap();
            (65534, path.clone())
        } else {
            root.user += 1;
            (root.user - 1, root.path.clone())
        };
        assert_eq!(root.check_program(&path), Err(Skipped::new(&refused, SkipReason::WrongOwner(owner))));
    }

    #[test]
    fn rejects_unknown_formats_and_what_is_not_executable() {
        let dir = program_dir();
        let root = open(&dir);
        for (name, text, mode, reason) in [
            ("text/bare", "echo hello\n", 0o755, SkipReason::UnknownFormat),
            ("text/empty", "", 0o755, SkipReason::UnknownFormat),
            ("text/notes", "notes", 0o644, SkipReason::NotExecutable),
        ] {
            let path = write(&dir, name, text, mode);
            assert_eq!(root.check_program(&path), Err(Skipped::new(&path, reason)), "{name}");
        }
        let directory = root.path.join("text");
        assert_eq!(root.check_program(&directory), Err(Skipped::new(&directory, SkipReason::NotAFile)));
    }

    #[test]
    fn follows_symlinks_inside_the_directory_only() {
        let dir = program_dir();
        let outside = program_dir();
        let elsewhere = write(&outside, "text/elsewhere", SCRIPT, 0o755);
        let upper = write(&dir, "text/upper", SCRIPT, 0o755);
        let root = open(&dir);
        let text = root.path.join("text");
        let shared = root.path.join("open");
        fs::create_dir(&shared).unwrap();
        set_mode(&shared, 0o777);
        symlink("upper", text.join("relative")).unwrap();
        symlink(&upper, text.join("absolute")).unwrap();
        symlink("text", root.path.join("also")).unwrap();
        symlink(&elsewhere, text.join("out")).unwrap();
        symlink("../../../../../../../bin/sh", text.join("up")).unwrap();
        symlink("circle", text.join("circle")).unwrap();
        symlink(outside.path().join("text"), root.path.join("away")).unwrap();
        // These end inside, but by a step that others control.
        symlink(&upper, outside.path().join("back")).unwrap();
        symlink(outside.path().join("back"), text.join("through")).unwrap();
        symlink("../text/upper", shared.join("back")).unwrap();
        symlink("../open/back", text.join("around")).unwrap();
        for name in ["text/upper", "text/relative", "text/absolute", "also/upper", "also/relative", "also/absolute"] {
            assert_eq!(root.check_program(&root.path.join(name)), Ok(()), "{name}");
        }
        for name in ["text/out", "text/up", "text/circle", "away/elsewhere", "text/through"] {
            let path = root.path.join(name);
            assert_eq!(root.check_program(&path), Err(Skipped::new(&path, SkipReason::SymlinkOutside)), "{name}");
        }
        let around = root.check_program(&text.join("around"));
        assert_eq!(around, Err(Skipped::new(&shared, SkipReason::WritableByOthers)));
    }

    #[test]
    fn rejects_a_program_directory_that_others_could_replace() {
        let dir = program_dir();
        write(&dir, "a/b/text/upper", SCRIPT, 0o755);
        let (path, parent) = (dir.path().join("a/b"), dir.path().canonicalize().unwrap().join("a"));
        let open = || ProgramRoot::open(&path);
        assert!(open().is_ok());
        set_mode(&parent, 0o777);
        let error = open().unwrap_err();
        assert!(
            matches!(&error, ProgramError::Unsafe { path, reason: SkipReason::WritableByOthers } if *path == parent),
            "{error:?}"
        );
        // As in /tmp: others may create files there, but not replace ours.
        set_mode(&parent, 0o1777);
        assert!(open().is_ok());
        set_mode(&path, 0o1777);
        assert!(matches!(open(), Err(ProgramError::Unsafe { reason: SkipReason::WritableByOthers, .. })));
        assert!(matches!(ProgramRoot::open(&dir.path().join("no")), Err(ProgramError::Unreadable { .. })));
    }
}
