//! Which node is looked at: by its name, or by the only key in the directory.

use crate::certs::DirectoryError;
use crate::cli::error::{CliError, Exit};
use crate::cli::{Global, identity, remedy};
use crate::packet::{Identity, Role};

/// Who the node is. The inner error is what is wrong with the directory or the names in it: something to be reported.
///
/// # Errors
/// [`CliError`] when no directory is named.
pub(super) fn find(
    global: &Global,
    who: &identity::IdentityArgs,
    role: Option<Role>,
) -> Result<Result<Identity, CliError>, CliError> {
    let directory = who.directory(&global.config, role.unwrap_or(Role::Agent))?;
    if !directory.path().is_dir() {
        let missing = DirectoryError::NoDirectory(directory.path().to_owned());
        return Ok(Err(remedy::directory(&missing, &directory)));
    }
    let roles = role.map_or(vec![Role::Agent, Role::Mapper], |role| vec![role]);
    let mut named = Vec::new();
    let mut here = Vec::new();
    for role in roles {
        let keys = identity::names_with_keys(directory.path(), role);
        match who.token(&global.config, role) {
            Some(name) => {
                let identity = identity::named(role, &name)?;
                let certificate = directory.certificate_path(&identity);
                if keys.contains(&name) || certificate.is_ok_and(|path| path.exists()) {
                    here.push(identity.clone());
                }
                named.push(identity);
            }
            None => here.extend(keys.iter().filter_map(|name| Identity::new(role, name).ok())),
        }
    }
    let dir = directory.path().display();
    let failure = match (here.as_slice(), named.as_slice()) {
        ([only], _) | ([], [only]) => return Ok(Ok(only.clone())),
        ([], []) => CliError::new(Exit::Security, format!("{dir} holds no key of an agent or mapper"))
            .help(format!("issue one with `nanite certs issue agent NAME --dir {dir}`")),
        ([], [one, ..]) => {
            CliError::new(Exit::Security, format!("{dir} holds nothing for an agent or mapper {}", one.name()))
                .help(format!("issue it with `nanite certs issue {} {} --dir {dir}`", one.role(), one.name()))
        }
        (several, _) => {
            let names: Vec<&str> = several.iter().map(Identity::as_str).collect();
            CliError::new(Exit::Usage, format!("which node? {dir} holds keys of {}", names.join(", ")))
                .help("name it: `--token NAME`, and `--role agent` or `--role mapper`")
        }
    };
    Ok(Err(failure))
}
