//! Sizes on the command line and in files: a number of bytes, or a number and a unit, such as `512KiB`, `100MiB` or `2GiB`.

/// Reads a size in bytes: a whole number, alone or with `KiB`, `MiB`, `GiB` or `TiB`.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let bad = || {
        format!("'{text}' is no size: give a number of bytes, or a number and a unit, such as 512KiB, 100MiB or 2GiB")
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or_else(bad)?;
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit: u64 = match unit {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(bad()),
    };
    number.checked_mul(unit).ok_or_else(bad)
}

/// The size for people: with the largest unit of which there is one at least.
pub(super) fn shown(bytes: u64) -> String {
    let units = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        // As exact as a person reads it.
        #[allow(clippy::cast_precision_loss)]
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n16_a_size_has_a_unit_or_is_in_bytes() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("17"), Ok(17));
        assert_eq!(parse("100MiB"), Ok(100 << 20));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        for bad in ["", "MiB", "-1", "1.5GiB", "1 GiB", "1GB", "1gib", "99999999TiB", "x"] {
            assert!(parse(bad).unwrap_err().contains("is no size"), "{bad:?}");
        }
    }

    #[test]
    fn n19_sizes_are_shown_for_people() {
        assert_eq!([shown(0), shown(1023), shown(1024), shown(104_857_600)], ["0 B", "1023 B", "1.0 KiB", "100.0 MiB"]);
    }
}
