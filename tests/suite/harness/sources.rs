//! The crate's own source code, read for the tests of its structure: its files, and the names that each file uses from others.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A source file of the crate.
pub struct Source {
    /// Its path below `src`.
    pub path: PathBuf,
    /// The top-level module that it belongs to: the first component of its path.
    pub module: String,
    /// Its code, without comments and the content of strings.
    pub code: String,
}

/// The project's root folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files below a folder, as paths from the project's root.
pub fn rust_files(folder: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// All files of `src`.
pub fn sources() -> Vec<Source> {
    let read = |path: &PathBuf| {
        let code = without_comments(&fs::read_to_string(root().join(path)).unwrap());
        let path = path.strip_prefix("src").unwrap().to_owned();
        let module = path.components().next().unwrap().as_os_str().to_str().unwrap();
        Source { module: module.trim_end_matches(".rs").to_owned(), code, path }
    };
    let found: Vec<Source> = rust_files("src").iter().map(read).collect();
    assert!(found.len() > 50, "only {} source files were found", found.len());
    found
}

/// Removes comments, and the content of strings. Good enough for this crate's own code; not a Rust lexer.
pub fn without_comments(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(c) = rest.chars().next() {
        let skipped = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            'r' if rest.starts_with("r\"") || rest.starts_with("r#\"") => raw_string(rest),
            '"' => string(rest),
            // A quote or a backslash as a character: it would look like the start of a string.
            '\'' if rest.starts_with("'\"'") => 3,
            '\'' if rest.starts_with("'\\") => 2 + rest[2..].find('\'').map_or(0, |end| end.max(1) + 1),
            _ => 0,
        };
        if skipped == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            if c == '"' || c == 'r' {
                out.push_str("\"\"");
            }
            rest = &rest[skipped..];
        }
    }
    out
}

fn string(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

fn raw_string(rest: &str) -> usize {
    let (start, end) = if rest.starts_with("r#") { (3, "\"#") } else { (2, "\"") };
    rest[start..].find(end).map_or(rest.len(), |at| start + at + end.len())
}

/// Removes modules that are compiled for tests only.
fn without_tests(code: &str) -> String {
    let (mut out, mut rest) = (String::new(), code);
    while let Some(at) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..at]);
        rest = &rest[at + "#[cfg(test)]".len()..];
        let item = rest.trim_start();
        if item.strip_prefix("pub(super) ").unwrap_or(item).starts_with("mod ") {
            let open = rest.find(['{', ';']).unwrap();
            rest = if rest[open..].starts_with('{') { &rest[open + block(&rest[open..])..] } else { &rest[open + 1..] };
        }
    }
    out + rest
}

/// The length of the block in braces at the start of this code.
fn block(code: &str) -> usize {
    let mut depth = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    code.len()
}

/// How many re-exports of a name are followed.
const MAX_REEXPORTS: usize = 8;

/// A path as segments: `["crate", "packet", "Identity"]`.
type Segments = Vec<String>;

/// The top-level modules that code names by `crate::`.
pub fn named_modules(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let end = if rest.starts_with('{') { block(rest) } else { rest.find([';', ',', '}']).unwrap_or(rest.len()) };
        let mut imports = Vec::new();
        leaves(&rest[..end], &[], false, &mut imports);
        names.extend(imports.into_iter().filter_map(|import| import.path.into_iter().next()));
    }
    let word = |name: &String| name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    // Names at the root that are no modules are macros and types.
    names.iter().map(word).filter(|name| name.starts_with(char::is_lowercase)).collect()
}

/// One name that a `use` statement brings in.
struct Import {
    path: Segments,
    /// The name by which it is known here; `*` for everything.
    name: String,
    /// Whether it only passes the name on: `pub use`, `pub(crate) use`.
    reexport: bool,
}

/// One file as a module.
struct Module {
    path: PathBuf,
    imports: Vec<Import>,
    /// Paths in the code outside of `use` statements.
    inline: BTreeSet<Segments>,
    /// All words in the code outside of `use` statements.
    words: BTreeSet<String>,
}

/// The names that one file uses from another: both as paths below `src`.
pub type Uses = BTreeMap<(PathBuf, PathBuf), BTreeSet<String>>;

/// Finds the names that each file uses from others, apart from unit tests. A name that a module re-exports counts for the file that defines it.
pub fn uses(sources: &[Source]) -> Uses {
    let modules: BTreeMap<Segments, Module> = sources
        .iter()
        .filter(|source| is_module(source))
        .map(|source| (module_path(&source.path), module(source)))
        .collect();
    let mut uses = Uses::new();
    for (place, module) in &modules {
        let imported = module.imports.iter().filter(|import| !import.reexport || module.words.contains(&import.name));
        for path in imported.map(|import| &import.path).chain(&module.inline) {
            let Some(owner) = owner(&modules, place, path, 0) else { continue };
            let from = &modules[&owner].path;
            if *from != module.path {
                let name = path.last().cloned().unwrap_or_default();
                uses.entry((module.path.clone(), from.clone())).or_default().insert(name);
            }
        }
    }
    uses
}

/// Whether it is part of the library: not the program's `main.rs`, nor a file of unit tests.
fn is_module(source: &Source) -> bool {
    source.path != Path::new("main.rs") && source.path.file_name().is_none_or(|name| name != "tests.rs")
}

fn module_path(path: &Path) -> Segments {
    let mut parts: Segments =
        path.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs").to_owned()).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib")) {
        parts.pop();
    }
    parts
}

fn module(source: &Source) -> Module {
    let (mut imports, mut body) = (Vec::new(), String::new());
    let code = without_tests(&source.code);
    let mut rest = &code[..];
    while let Some(at) = next_use(rest) {
        let head = &rest[..at];
        let statement_start = head.rfind([';', '{', '}', ']']).map_or(0, |end| end + 1);
        let reexport = head[statement_start..].trim_start().starts_with("pub");
        body.push_str(head);
        let end = at + rest[at..].find(';').unwrap();
        leaves(&rest[at + "use ".len()..end], &[], reexport, &mut imports);
        rest = &rest[end + 1..];
    }
    body.push_str(rest);
    // `mod name;` declares a file; it uses nothing of it.
    let lines = body.lines().filter(|line| !(line.contains("mod ") && line.ends_with(';')));
    let body = lines.collect::<Vec<_>>().join("\n").replace("pub(in crate", "pub(in ");
    let words = body.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect();
    Module { path: source.path.clone(), imports, inline: inline(&body), words }
}

/// Where the next `use` statement begins.
fn next_use(code: &str) -> Option<usize> {
    let mut matches = code.match_indices("use ").map(|(at, _)| at);
    matches.find(|at| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// The names in a `use` tree: `a::{b, c::{d as e, *}}`.
fn leaves(tree: &str, above: &[String], reexport: bool, found: &mut Vec<Import>) {
    let tree = tree.trim();
    let Some((first, rest)) = tree.split_once("::").filter(|(first, _)| !first.contains(['{', ','])) else {
        if let Some(group) = tree.strip_prefix('{') {
            let inside = group.strip_suffix('}').unwrap_or(group);
            let mut depth = 0;
            let parts = inside.split(|c| {
                depth += i32::from(c == '{') - i32::from(c == '}');
                c == ',' && depth == 0
            });
            for part in parts.filter(|part| !part.trim().is_empty()) {
                leaves(part, above, reexport, found);
            }
        } else {
            let (real, name) = tree.split_once(" as ").unwrap_or((tree, tree));
            let path = if real == "self" { above.to_vec() } else { [above, &[real.trim().to_owned()]].concat() };
            let name = if name == "self" { path.last().cloned().unwrap_or_default() } else { name.trim().to_owned() };
            found.push(Import { path, name, reexport });
        }
        return;
    };
    leaves(rest, &[above, &[first.trim().to_owned()]].concat(), reexport, found);
}

/// The paths with `::` in code.
fn inline(code: &str) -> BTreeSet<Segments> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = BTreeSet::new();
    let mut rest = code;
    while let Some(start) = rest.find(is_word) {
        rest = &rest[start..];
        let mut segments = Vec::new();
        loop {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            segments.push(rest[..end].to_owned());
            rest = &rest[end..];
            match rest.strip_prefix("::") {
                Some(after) if after.starts_with(is_word) => rest = after,
                _ => break,
            }
        }
        if segments.len() > 1 {
            found.insert(segments);
        }
    }
    found
}

/// The module that defines what a path names, as seen from the module `place`; none for a path into another crate.
fn owner(modules: &BTreeMap<Segments, Module>, place: &[String], path: &[String], depth: usize) -> Option<Segments> {
    if depth > MAX_REEXPORTS {
        return None;
    }
    let (first, mut rest) = path.split_first()?;
    let mut at = match first.as_str() {
        "crate" => Vec::new(),
        "self" => place.to_vec(),
        "super" => parent(place)?,
        name if modules.contains_key(&child(place, name)) => child(place, name),
        name => {
            // A name that this module has imported: `topology::process_queue(..)`.
            let import = modules[place].imports.iter().find(|import| import.name == name)?;
            let full = [&import.path[..], rest].concat();
            return owner(modules, place, &full, depth + 1).filter(|_| import.path.first() != Some(first));
        }
    };
    while let Some((name, after)) = rest.split_first() {
        let next = if name == "super" { parent(&at)? } else { child(&at, name) };
        if !modules.contains_key(&next) {
            break;
        }
        (at, rest) = (next, after);
    }
    let Some(name) = rest.first() else { return Some(at) };
    let mut imports = modules[&at].imports.iter();
    let import = imports.find(|import| import.name == *name && import.path.last() != Some(first));
    let defined_elsewhere = import.and_then(|import| owner(modules, &at, &import.path, depth + 1));
    Some(defined_elsewhere.unwrap_or(at))
}

fn parent(place: &[String]) -> Option<Segments> {
    Some(place.split_last()?.1.to_vec())
}

fn child(place: &[String], name: &str) -> Segments {
    [place, &[name.to_owned()]].concat()
}

/// Groups of files that use each other in a circle, each with the uses inside it.
pub fn circles(uses: &Uses) -> Vec<Vec<String>> {
    let mut direct: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
    for (user, used) in uses.keys() {
        direct.entry(user).or_default().insert(used);
    }
    let reach: BTreeMap<&Path, BTreeSet<&Path>> = direct.keys().map(|file| (*file, reachable(&direct, file))).collect();
    let reaches = |from: &Path, to: &Path| reach.get(from).is_some_and(|reached| reached.contains(to));
    let group = |file: &&Path| -> BTreeSet<&Path> {
        reach[file].iter().filter(|other| reaches(other, file)).copied().collect()
    };
    let groups: BTreeSet<BTreeSet<&Path>> = reach.keys().map(group).filter(|group| !group.is_empty()).collect();
    let describe = |group: BTreeSet<&Path>| {
        let inside = uses.iter().filter(|((user, used), _)| group.contains(&**user) && group.contains(&**used));
        inside.map(|((user, used), names)| format!("{} uses {names:?} of {}", user.display(), used.display())).collect()
    };
    groups.into_iter().map(describe).collect()
}

/// All files that a file uses, directly or through others.
fn reachable<'a>(direct: &BTreeMap<&Path, BTreeSet<&'a Path>>, from: &Path) -> BTreeSet<&'a Path> {
    let mut found = BTreeSet::new();
    let mut next: Vec<&Path> = direct[from].iter().copied().collect();
    while let Some(file) = next.pop() {
        if found.insert(file) {
            next.extend(direct.get(file).into_iter().flatten().copied());
        }
    }
    found
}
