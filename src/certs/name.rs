//! Distinguished names, for people to read.

use openssl::x509::X509NameRef;

/// The longest text of a name, in characters.
const MAX: usize = 200;

/// A distinguished name as `CN=..., O=...`: what cannot be printed is escaped, what is too long is cut.
pub(crate) fn text(name: &X509NameRef) -> String {
    let mut text = String::new();
    for entry in name.entries() {
        let key = entry.object().nid().short_name().unwrap_or("?");
        let value = entry.data().to_string().unwrap_or_default();
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.extend([key, "="]);
        text.extend(value.chars().take(MAX).flat_map(|c| c.escape_debug()));
        if text.chars().count() > MAX {
            return text.chars().take(MAX).chain("...".chars()).collect();
        }
    }
    if text.is_empty() { "no name".into() } else { text }
}
