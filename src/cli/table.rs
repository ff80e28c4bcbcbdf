//! Tables: with lines on a terminal, plain columns in a pipe.

use std::io::IsTerminal;

use comfy_table::{ContentArrangement, Table, presets};

use super::error::CliError;
use super::output;
use super::text::printable;

/// The narrowest terminal that tables are fitted into, in columns.
const NARROW: u16 = 40;

/// Prints rows under their heads.
pub(super) fn print<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> Result<(), CliError> {
    if std::io::stdout().is_terminal() {
        output::line(&for_people(heads, rows))
    } else {
        plain(heads, rows).iter().try_for_each(|row| output::line(row))
    }
}

fn for_people<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    // Into less than this nothing is fitted: a terminal that does not know its width says 0.
    if table.width().is_some_and(|width| width >= NARROW) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(heads);
    for row in rows {
        table.add_row(row.each_ref().map(|cell| printable(cell, true).into_owned()));
    }
    table.to_string()
}

/// Columns that are parted by two blanks at least; a line for each row.
fn plain<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> Vec<String> {
    let one_line = |cell: &String| printable(&cell.replace('\n', ", "), false).into_owned();
    let rows: Vec<[String; N]> =
        std::iter::once(heads.map(str::to_owned)).chain(rows.iter().map(|row| row.each_ref().map(one_line))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_columns_in_a_pipe_are_plain() {
        let rows = [["nanite-fred".into(), "/a/b\n/c/d".into()], ["nanite-bo".into(), "/x\x1b[2J".into()]];
        assert_eq!(
            plain(["AGENT", "SERVICES"], &rows),
            ["AGENT        SERVICES", "nanite-fred  /a/b, /c/d", "nanite-bo    /x\\u{1b}[2J"]
        );
        assert!(for_people(["AGENT", "SERVICES"], &rows).contains("/c/d"));
    }
}
