//! Rows as text, for people.

/// Columns as wide as their widest cells, two spaces between them.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["MACHINE", "STATE", "PID"], ["a-long-name", "running", "7"]];
        let text = table(&rows.map(|row| row.map(str::to_owned)));
        assert_eq!(text, "MACHINE      STATE    PID\na-long-name  running  7\n");
    }
}
