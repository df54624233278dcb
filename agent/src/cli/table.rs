//! How commands print: tables, and colour where somebody looks. What is printed is each command's.

use std::{fmt::Write as _, io::IsTerminal as _};

/// Whether to colour: on a terminal, unless NO_COLOR says not to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Colour(bool);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Paint {
    #[default]
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
}

/// Something to print, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) paint: Paint,
}

impl Colour {
    pub(super) fn of_stdout() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self(wanted && std::io::stdout().is_terminal())
    }

    #[cfg(test)]
    pub(super) const OFF: Self = Self(false);

    pub(super) fn is_on(self) -> bool {
        self.0
    }

    pub(super) fn paint(self, text: &str, paint: Paint) -> String {
        let code = match paint {
            Paint::Good => "32",
            Paint::Warning => "33",
            Paint::Bad => "31",
            Paint::Faint => "2",
            Paint::Plain => return text.to_owned(),
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl Cell {
    pub(super) fn new(text: impl AsRef<str>, paint: Paint) -> Self {
        Self { text: plain(text.as_ref()), paint }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Paint::Plain)
    }
}

/// Columns as wide as what is in them, two spaces between; the last one ends where it ends.
pub(super) fn table(header: &[&str], rows: &[Vec<Cell>], colour: Colour) -> String {
    let width = |column: usize| {
        let of = |row: &Vec<Cell>| row.get(column).map_or(0, |cell| cell.text.chars().count());
        let head = header.get(column).map_or(0, |name| name.chars().count());
        rows.iter().map(of).max().unwrap_or_default().max(head)
    };
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default().max(header.len());
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let header = header.iter().map(Cell::from).collect::<Vec<_>>();
    let mut out = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let last = row.iter().rposition(|cell| !cell.text.is_empty()).unwrap_or_default();
        let mut line = String::new();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate().take(last + 1) {
            // Padded outside of the colour, so that an underlined or reversed terminal shows words and no bars.
            let padding = if at == last { 0 } else { width.saturating_sub(cell.text.chars().count()) + 2 };
            line.push_str(&colour.paint(&cell.text, cell.paint));
            line.extend(std::iter::repeat_n(' ', padding));
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// Text that may be a peer's: nothing in it moves the cursor, or turns the way it is read.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|character| if is_harmful(character) { '?' } else { character }).collect()
}

/// The same of text that has lines.
pub(super) fn plain_lines(text: &str) -> String {
    text.chars().map(|character| if character != '\n' && is_harmful(character) { '?' } else { character }).collect()
}

fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Bytes, as people read them.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{count} {name}") } else { format!("{value:.1} {name}") }
}

/// Time that has passed, in its two largest units.
pub(super) fn age(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0 => format!("{milliseconds}ms"),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Seconds since 1970, as RFC 3339.
pub(super) fn time(seconds: u64) -> String {
    let since = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
    // What cannot be written is far beyond what a certificate can say.
    let sane = since.filter(|_| seconds < 253_402_300_800);
    sane.map_or_else(|| "-".to_owned(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [vec!["a".into(), "long word".into(), "x".into()], vec!["abc".into(), Cell::from(""), "y".into()]];
        assert_eq!(
            table(&["A", "B", "C"], &rows, Colour::OFF),
            "A    B          C\na    long word  x\nabc             y\n"
        );
    }

    #[test]
    fn what_a_peer_may_have_chosen_moves_no_cursor() {
        assert_eq!(table(&["A"], &[vec![Cell::from("x\x1b[2Jy\n")]], Colour::OFF), "A\nx?[2Jy?\n");
        assert_eq!(plain_lines("a\u{9b}2J\n\u{202e}b\r"), "a?2J\n?b?");
    }

    #[test]
    fn colour_is_around_the_word_alone() {
        let text = table(&["A", "B"], &[vec![Cell::new("ok", Paint::Good), "b".into()]], Colour(true));
        assert_eq!(text, "A   B\n\x1b[32mok\x1b[0m  b\n");
    }

    #[test]
    fn numbers_are_read_by_people() {
        assert_eq!((bytes(1023), bytes(1536), bytes(3 << 30)), ("1023 B".into(), "1.5 KiB".into(), "3.0 GiB".into()));
        assert_eq!((age(999), age(61_000), age(90_000_000)), ("999ms".into(), "1m1s".into(), "1d1h".into()));
        assert_eq!((time(0), time(u64::MAX)), ("1970-01-01T00:00:00Z".into(), "-".into()));
    }
}
