//! The directory of programs: which of its files may be run as which service, and why others may not.
//!
//! Who can write a file decides what runs. So every step from the root of the file system to the program must belong to the
//! user of this process or to root and be closed to others; a symbolic link is followed step by step, inside the directory only.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::ProgramError;
use crate::packet::{Register, Service};

/// How many symbolic links are followed on the way to one program.
const MAX_LINKS: usize = 8;
/// How many entries of the directory are looked at in one scan.
const MAX_ENTRIES: usize = 16_384;
/// Write permission of the group and of everybody else.
const OTHERS_WRITE: u32 = 0o022;
/// In such a directory only a file's owner can rename or remove it.
const STICKY: u32 = 0o1000;

/// How the files begin that the kernel runs by itself. Anything else would be handed to a shell by the C library, as a guess.
const MAGIC: &[&[u8]] = if cfg!(target_vendor = "apple") {
    &[b"#!", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"]
} else {
    &[b"#!", b"\x7fELF"]
};

/// An entry of the directory that is not offered as a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// What the reason is about: the entry itself, or what a symbolic link leads to.
    pub path: PathBuf,
    /// Why it is not offered.
    pub reason: SkipReason,
}

/// Why an entry of the directory is not offered as a service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SkipReason {
    /// Its name cannot be part of a service's name.
    #[error("its name has other characters than letters, digits, '-', '_' and '.', or is too long")]
    Name,
    /// The group or everybody may write it.
    #[error("others may write it, and so decide what runs (chmod go-w)")]
    OthersMayWrite,
    /// It belongs to another user, who may write it.
    #[error("it belongs to the user {0}, not to the one that this process runs as, nor to root")]
    Owner(u32),
    /// It is a symbolic link that leaves the directory, goes in circles, or is too long.
    #[error("it is a symbolic link that does not stay inside the directory of programs")]
    Link,
    /// It is a file beside the prefixes: a program is DIR/PREFIX/NAME.
    #[error("it is no directory: a program is DIR/PREFIX/NAME")]
    NoPrefix,
    /// It is a directory, a device, or the like.
    #[error("it is no file")]
    NoFile,
    /// This process may not run it.
    #[error("it is not executable for this process")]
    NotExecutable,
    /// It is neither a script that names its interpreter nor a program of this system.
    #[error("it begins neither with #! nor as a program of this system does")]
    Format,
    /// There are more programs than one agent may offer, or more entries than are looked at.
    #[error("there are too many")]
    TooMany,
    /// It cannot be looked at.
    #[error("cannot be read: {0}")]
    Unreadable(io::ErrorKind),
}

impl SkipReason {
    /// Whether it is normal for a file that was not meant to be a program, such as a README.
    fn is_expected(&self) -> bool {
        matches!(self, SkipReason::NoPrefix | SkipReason::NoFile | SkipReason::NotExecutable)
    }
}

/// A program that may be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// DIR/PREFIX/NAME, not resolved: a program may tell by the name it is called with what to do.
    pub path: PathBuf,
    /// DIR/PREFIX, where it runs.
    pub directory: PathBuf,
}

/// What a scan has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    pub programs: BTreeMap<Service, Program>,
    /// By entry.
    pub skipped: BTreeMap<PathBuf, Skipped>,
    /// The directories that were looked into.
    pub directories: BTreeSet<PathBuf>,
}

impl Listing {
    fn skip(&mut self, entry: PathBuf, skipped: Skipped) {
        self.skipped.insert(entry, skipped);
    }

    /// Logs what is skipped now and was not before.
    pub fn log_news(&self, before: &Listing) {
        for (entry, skipped) in &self.skipped {
            if before.skipped.get(entry) == Some(skipped) {
                continue;
            }
            let Skipped { path, reason } = skipped;
            if reason.is_expected() {
                tracing::debug!(?entry, %reason, "no program");
            } else {
                tracing::warn!(?entry, ?path, %reason, "not offered as a service");
            }
        }
    }
}

/// A directory of programs.
#[derive(Debug)]
pub(super) struct Directory {
    /// Without symbolic links.
    root: PathBuf,
    /// The prefixes that are offered; empty: all.
    only: BTreeSet<String>,
    /// The user of this process.
    user: u32,
}

impl Directory {
    /// Looks at `dir` itself, and at the directories above it. Blocks on the file system.
    pub fn open(dir: &Path, only: Vec<String>) -> Result<Self, ProgramError> {
        let unreadable = |source| ProgramError::Unreadable { path: dir.to_owned(), source };
        let root = dir.canonicalize().map_err(unreadable)?;
        let user = rustix::process::geteuid().as_raw();
        for above in root.ancestors() {
            let meta = fs::symlink_metadata(above).map_err(unreadable)?;
            let shared = above != root && meta.mode() & STICKY != 0;
            if let Err(reason) = closed_to_others(&meta, user, shared) {
                return Err(ProgramError::Unsafe { path: above.to_owned(), reason });
            }
        }
        let directory = Self { root, only: only.into_iter().collect(), user };
        fs::read_dir(&directory.root).map_err(unreadable)?;
        for prefix in &directory.only {
            if format!("/{prefix}").parse::<Service>().is_err() || prefix.contains('/') {
                return Err(ProgramError::Prefix(prefix.clone()));
            }
            if !directory.root.join(prefix).is_dir() {
                return Err(ProgramError::NoSuchPrefix { prefix: prefix.clone(), path: directory.root });
            }
        }
        Ok(directory)
    }

    /// Looks for programs. Blocks on the file system.
    pub fn scan(&self) -> Listing {
        let mut listing = Listing::default();
        let mut entries = 0;
        for name in self.entries(&self.root, &mut listing, &mut entries) {
            let path = self.root.join(&name);
            if !self.only.is_empty() && !name.to_str().is_some_and(|name| self.only.contains(name)) {
                continue;
            }
            match self.prefix(&path) {
                Ok(real) => {
                    for program in self.entries(&real, &mut listing, &mut entries) {
                        self.list(&path, &name, &program, &mut listing);
                    }
                }
                Err(skipped) => listing.skip(path, skipped),
            }
        }
        listing
    }

    /// Whether the program may still be run: what was found may have changed since. Blocks on the file system.
    pub fn check(&self, program: &Path) -> Result<(), Skipped> {
        let skip = |path: &Path, reason| Err(Skipped { path: path.to_owned(), reason });
        let (real, meta) = self.resolve(program)?;
        if !meta.is_file() {
            return skip(&real, SkipReason::NoFile);
        }
        if accessat(CWD, &real, Access::EXEC_OK, AtFlags::EACCESS).is_err() {
            return skip(&real, SkipReason::NotExecutable);
        }
        match begins_as_program(&real) {
            Ok(true) => Ok(()),
            Ok(false) => skip(&real, SkipReason::Format),
            Err(error) => skip(&real, SkipReason::Unreadable(error.kind())),
        }
    }

    fn list(&self, directory: &Path, prefix: &OsStr, name: &OsStr, listing: &mut Listing) {
        let path = directory.join(name);
        let service = match (prefix.to_str(), name.to_str()) {
            (Some(prefix), Some(name)) => format!("/{prefix}/{name}").parse::<Service>().ok(),
            _ => None,
        };
        let reason = match (self.check(&path), service) {
            // The name of a file that is no program does not matter.
            (Err(skipped), _) => Err(skipped),
            (Ok(()), None) => Err(Skipped { path: path.clone(), reason: SkipReason::Name }),
            (Ok(()), Some(_)) if listing.programs.len() >= Register::MAX_SERVICES => {
                Err(Skipped { path: path.clone(), reason: SkipReason::TooMany })
            }
            (Ok(()), Some(service)) => Ok(service),
        };
        match reason {
            Ok(service) => {
                listing.programs.insert(service, Program { path, directory: directory.to_owned() });
            }
            Err(skipped) => listing.skip(path, skipped),
        }
    }

    /// Where the directory of a prefix really is.
    fn prefix(&self, path: &Path) -> Result<PathBuf, Skipped> {
        let (real, meta) = self.resolve(path)?;
        if meta.is_dir() { Ok(real) } else { Err(Skipped { path: path.to_owned(), reason: SkipReason::NoPrefix }) }
    }

    /// The names in a directory that are not hidden, in order.
    fn entries(&self, directory: &Path, listing: &mut Listing, seen: &mut usize) -> BTreeSet<OsString> {
        let mut names = BTreeSet::new();
        let unreadable =
            |error: io::Error| Skipped { path: directory.to_owned(), reason: SkipReason::Unreadable(error.kind()) };
        listing.directories.insert(directory.to_owned());
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) => {
                listing.skip(directory.to_owned(), unreadable(error));
                return names;
            }
        };
        for entry in entries {
            *seen += 1;
            if *seen > MAX_ENTRIES {
                let skipped = Skipped { path: directory.to_owned(), reason: SkipReason::TooMany };
                listing.skip(directory.to_owned(), skipped);
                break;
            }
            match entry {
                Ok(entry) if entry.file_name().as_encoded_bytes().starts_with(b".") => {}
                Ok(entry) => {
                    names.insert(entry.file_name());
                }
                Err(error) => listing.skip(directory.to_owned(), unreadable(error)),
            }
        }
        names
    }

    /// Follows a path below the root, links included, and looks at every step. Gives the real path and what is there.
    fn resolve(&self, path: &Path) -> Result<(PathBuf, Metadata), Skipped> {
        let refuse = |path: &Path, reason| Skipped { path: path.to_owned(), reason };
        let unreadable = |path: &Path, error: io::Error| refuse(path, SkipReason::Unreadable(error.kind()));
        let leaves = || refuse(path, SkipReason::Link);
        let below = |path: &Path| -> Option<Vec<OsString>> {
            Some(path.strip_prefix(&self.root).ok()?.iter().map(OsStr::to_owned).collect())
        };
        let mut ahead: VecDeque<OsString> = below(path).ok_or_else(leaves)?.into();
        let mut at = self.root.clone();
        let mut meta = fs::symlink_metadata(&at).map_err(|error| unreadable(&at, error))?;
        closed_to_others(&meta, self.user, false).map_err(|reason| refuse(&at, reason))?;
        let mut links = 0;
        while let Some(step) = ahead.pop_front() {
            let step = Path::new(&step);
            match step.components().next() {
                Some(Component::ParentDir) if at != self.root => {
                    at.pop();
                }
                Some(Component::CurDir) => {}
                Some(Component::Normal(name)) => at.push(name),
                _ => return Err(leaves()),
            }
            meta = fs::symlink_metadata(&at).map_err(|error| unreadable(&at, error))?;
            if !meta.is_symlink() {
                closed_to_others(&meta, self.user, false).map_err(|reason| refuse(&at, reason))?;
                continue;
            }
            links += 1;
            let target = fs::read_link(&at).map_err(|error| unreadable(&at, error))?;
            at.pop();
            let target: Vec<OsString> = if target.is_absolute() {
                at.clone_from(&self.root);
                below(&target).ok_or_else(leaves)?
            } else {
                target.iter().map(OsStr::to_owned).collect()
            };
            if links > MAX_LINKS {
                return Err(leaves());
            }
            for step in target.into_iter().rev() {
                ahead.push_front(step);
            }
        }
        Ok((at, meta))
    }
}

/// Whether nobody but root and `user` may write it. In a `shared` directory (sticky) others may, but not touch what is ours.
fn closed_to_others(meta: &Metadata, user: u32, shared: bool) -> Result<(), SkipReason> {
    if meta.uid() != 0 && meta.uid() != user {
        return Err(SkipReason::Owner(meta.uid()));
    }
    if meta.mode() & OTHERS_WRITE != 0 && !shared {
        return Err(SkipReason::OthersMayWrite);
    }
    Ok(())
}

/// Whether the kernel itself runs such a file. One that may be run but not read can be no script: it is left to the kernel.
fn begins_as_program(path: &Path) -> io::Result<bool> {
    let mut begin = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(4).read_to_end(&mut begin)?,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
        Err(error) => return Err(error),
    };
    Ok(MAGIC.iter().any(|magic| begin.starts_with(magic)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use tempfile::TempDir;

    use super::*;

    const SCRIPT: &str = "#!/bin/sh\n";

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn temporary() -> TempDir {
        let dir = TempDir::new().unwrap();
        mode(dir.path(), 0o755);
        dir
    }

    fn put(dir: &TempDir, name: &str, text: &str, bits: u32) -> PathBuf {
        let root = dir.path().canonicalize().unwrap();
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for directory in path.ancestors().skip(1).take_while(|directory| *directory != root) {
            mode(directory, 0o755);
        }
        fs::write(&path, text).unwrap();
        mode(&path, bits);
        path
    }

    fn open(dir: &TempDir) -> Directory {
        Directory::open(dir.path(), Vec::new()).unwrap()
    }

    fn services(listing: &Listing) -> Vec<&str> {
        listing.programs.keys().map(Service::as_str).collect()
    }

    fn why(listing: &Listing, path: &Path) -> SkipReason {
        listing.skipped[path].reason.clone()
    }

    #[test]
    fn executables_two_levels_down_are_services() {
        let dir = temporary();
        let upper = put(&dir, "text/upper", SCRIPT, 0o755);
        put(&dir, "disk/usage.sh", SCRIPT, 0o700);
        put(&dir, "text/.hidden", SCRIPT, 0o755);
        put(&dir, ".git/hook", SCRIPT, 0o755);
        let readme = put(&dir, "README.md", "read me", 0o644);
        let notes = put(&dir, "text/notes", "notes", 0o644);
        let deep = put(&dir, "text/deep/er", SCRIPT, 0o755);
        let listing = open(&dir).scan();
        assert_eq!(services(&listing), ["/disk/usage.sh", "/text/upper"]);
        let found = &listing.programs[&"/text/upper".parse().unwrap()];
        assert_eq!((found.path.as_path(), found.directory.as_path()), (&*upper, upper.parent().unwrap()));
        assert_eq!(listing.skipped.len(), 3, "{listing:?}");
        assert_eq!(why(&listing, &readme), SkipReason::NoPrefix);
        assert_eq!(why(&listing, &notes), SkipReason::NotExecutable);
        assert_eq!(why(&listing, deep.parent().unwrap()), SkipReason::NoFile);
    }

    #[test]
    fn names_and_formats_that_cannot_be_offered_are_skipped() {
        let dir = temporary();
        let space = put(&dir, "text/to upper", SCRIPT, 0o755);
        let backup = put(&dir, "text/upper~", SCRIPT, 0o755);
        let umlaut = put(&dir, "tëxt/upper", SCRIPT, 0o755);
        let bare = put(&dir, "text/bare", "echo hello\n", 0o755);
        let empty = put(&dir, "text/empty", "", 0o755);
        let listing = open(&dir).scan();
        assert!(listing.programs.is_empty());
        for path in [&space, &backup, &umlaut] {
            assert_eq!(why(&listing, path), SkipReason::Name, "{path:?}");
        }
        for path in [&bare, &empty] {
            assert_eq!(why(&listing, path), SkipReason::Format, "{path:?}");
        }
    }

    #[test]
    fn what_others_may_write_is_refused_wherever_it_stands() {
        let dir = temporary();
        let by_group = put(&dir, "text/group", SCRIPT, 0o775);
        let by_all = put(&dir, "text/all", SCRIPT, 0o757);
        let inside = put(&dir, "open/program", SCRIPT, 0o755);
        let prefix = inside.parent().unwrap();
        mode(prefix, 0o1777);
        let directory = open(&dir);
        let listing = directory.scan();
        assert!(listing.programs.is_empty());
        for path in [&by_group, &by_all, &prefix.to_owned()] {
            assert_eq!(why(&listing, path), SkipReason::OthersMayWrite, "{path:?}");
        }
        // Once it is closed it is offered; opened again, it is not run even before the next scan.
        mode(prefix, 0o755);
        assert_eq!(services(&directory.scan()), ["/open/program"]);
        mode(prefix, 0o777);
        let refused = Skipped { path: prefix.to_owned(), reason: SkipReason::OthersMayWrite };
        assert_eq!(directory.check(&inside), Err(refused));
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        let dir = temporary();
        let path = put(&dir, "text/upper", SCRIPT, 0o755);
        let mut directory = open(&dir);
        // Only root can give a file away; anybody else looks with another user's eyes.
        let (owner, refused) = if directory.user == 0 {
            chown(&path, Some(65534), None).unwrap();
            (65534, path.clone())
        } else {
            directory.user += 1;
            (directory.user - 1, directory.root.clone())
        };
        assert_eq!(directory.check(&path), Err(Skipped { path: refused, reason: SkipReason::Owner(owner) }));
    }

    #[test]
    fn links_are_followed_inside_the_directory_only() {
        let dir = temporary();
        let outside = temporary();
        let elsewhere = put(&outside, "text/elsewhere", SCRIPT, 0o755);
        let upper = put(&dir, "text/upper", SCRIPT, 0o755);
        let text = upper.parent().unwrap();
        let root = text.parent().unwrap();
        let open_to_all = root.join("open");
        fs::create_dir(&open_to_all).unwrap();
        mode(&open_to_all, 0o777);
        symlink("upper", text.join("relative")).unwrap();
        symlink(&upper, text.join("absolute")).unwrap();
        symlink("text", root.join("also")).unwrap();
        symlink(&elsewhere, text.join("out")).unwrap();
        symlink("../../../../../../../bin/sh", text.join("up")).unwrap();
        symlink("circle", text.join("circle")).unwrap();
        symlink(outside.path().join("text"), root.join("away")).unwrap();
        // It ends inside, but passes where others decide what it is.
        symlink(&upper, outside.path().join("back")).unwrap();
        symlink(outside.path().join("back"), text.join("through")).unwrap();
        symlink("../text/upper", open_to_all.join("back")).unwrap();
        symlink("../open/back", text.join("around")).unwrap();
        let listing = open(&dir).scan();
        let offered =
            ["/also/absolute", "/also/relative", "/also/upper", "/text/absolute", "/text/relative", "/text/upper"];
        assert_eq!(services(&listing), offered);
        for name in ["text/out", "text/up", "text/circle", "away", "text/through"] {
            assert_eq!(why(&listing, &root.join(name)), SkipReason::Link, "{name}");
        }
        assert_eq!(why(&listing, &text.join("around")), SkipReason::OthersMayWrite);
    }

    #[test]
    fn a_directory_that_others_may_replace_is_not_opened() {
        let dir = temporary();
        put(&dir, "a/b/text/upper", SCRIPT, 0o755);
        let (root, above) = (dir.path().join("a/b"), dir.path().canonicalize().unwrap().join("a"));
        let open = || Directory::open(&root, Vec::new());
        assert!(open().is_ok());
        mode(&above, 0o777);
        let error = open().unwrap_err();
        assert!(
            matches!(&error, ProgramError::Unsafe { path, reason: SkipReason::OthersMayWrite } if *path == above),
            "{error:?}"
        );
        // As in /tmp: others may make files there, but not replace ours.
        mode(&above, 0o1777);
        assert!(open().is_ok());
        mode(&root, 0o1777);
        assert!(matches!(open(), Err(ProgramError::Unsafe { reason: SkipReason::OthersMayWrite, .. })));
    }

    #[test]
    fn prefixes_are_picked_and_must_exist() {
        let dir = temporary();
        for name in ["a/one", "b/two", "c/three"] {
            put(&dir, name, SCRIPT, 0o755);
        }
        let pick = |only: &[&str]| Directory::open(dir.path(), only.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(services(&pick(&["c", "a"]).unwrap().scan()), ["/a/one", "/c/three"]);
        assert!(matches!(pick(&["a", "d"]), Err(ProgramError::NoSuchPrefix { prefix, .. }) if prefix == "d"));
        for bad in ["", "..", "a/one", "/a", "a b"] {
            assert!(matches!(pick(&[bad]), Err(ProgramError::Prefix(prefix)) if prefix == bad), "{bad:?}");
        }
        assert!(matches!(Directory::open(&dir.path().join("no"), Vec::new()), Err(ProgramError::Unreadable { .. })));
    }

    #[test]
    fn no_more_programs_are_offered_than_an_agent_may_register() {
        let dir = temporary();
        for number in 0..=Register::MAX_SERVICES {
            put(&dir, &format!("many/{number:05}"), SCRIPT, 0o755);
        }
        let listing = open(&dir).scan();
        assert_eq!(listing.programs.len(), Register::MAX_SERVICES);
        assert_eq!(listing.skipped.values().map(|skipped| &skipped.reason).collect::<Vec<_>>(), [&SkipReason::TooMany]);
    }
}
