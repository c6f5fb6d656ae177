//! Aligned columns without boxes, and short forms of times.

use oblak_model::Timestamp;

/// Rows under headings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// One more row, a cell per heading.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The text. Columns are two spaces apart; the last is not filled up. An empty cell shows `-`.
    pub fn render(&self, color: bool) -> String {
        let columns = self.head.len();
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let width = |c: usize| lines().map(|r| r.get(c).map_or(1, |t| visible(t).max(1))).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for (n, row) in lines().enumerate() {
            for (c, width) in widths.iter().enumerate() {
                let text = row.get(c).map(|t| one_line(t)).filter(|t| !t.is_empty()).unwrap_or_else(|| "-".into());
                let fill = if c + 1 == columns { 0 } else { width + 2 - visible(&text) };
                match paint(&text).filter(|_| color && n > 0) {
                    Some(code) => out.push_str(&format!("\x1b[{code}m{text}\x1b[0m")),
                    None if color && n == 0 => out.push_str(&format!("\x1b[1m{text}\x1b[0m")),
                    None => out.push_str(&text),
                }
                out.extend(std::iter::repeat_n(' ', fill));
            }
            out.push('\n');
        }
        out
    }
}

fn visible(text: &str) -> usize {
    one_line(text).chars().count()
}

/// Messages may hold anything; a table line is one line, and a terminal is not steered by it.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim_end().to_string()
}

/// Colour (SGR code) of words that stand for a state.
fn paint(text: &str) -> Option<u8> {
    // `importing 40 %`
    match text.strip_suffix(" %").and_then(|t| t.split_once(' ')).map_or(text, |(word, _)| word) {
        "running" | "ready" | "available" | "in_use" => Some(32),
        "pending" | "scheduled" | "starting" | "stopping" | "deleting" | "importing" | "paused" | "cordoned" => {
            Some(33)
        }
        "failed" | "unknown" | "down" | "warning" => Some(31),
        _ => None,
    }
}

/// `42s`, `5m`, `3h`, `2d`: the time since a moment.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    if since == Timestamp::EPOCH {
        return String::new();
    }
    let s = now.since(since).as_secs();
    match s {
        0..120 => format!("{s}s"),
        120..7200 => format!("{}m", s / 60),
        7200..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// The time on this machine.
pub fn now() -> Timestamp {
    oblak_platform::clock::system().now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_aligned_columns() {
        let mut table = Table::new(&["NAME", "STATE", "MESSAGE"]);
        table.row(vec!["web".into(), "running".into(), String::new()]);
        table.row(vec!["a-longer-name".into(), "pending".into(), "image tiny:\nbuilding (40 %)".into()]);
        assert_eq!(
            table.render(false),
            "NAME           STATE    MESSAGE\n\
             web            running  -\n\
             a-longer-name  pending  image tiny: building (40 %)\n"
        );
    }

    #[test]
    fn colours_states_only() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["web".into(), "failed".into()]);
        assert_eq!(table.render(true), "\x1b[1mNAME\x1b[0m  \x1b[1mSTATE\x1b[0m\nweb   \x1b[31mfailed\x1b[0m\n");
    }

    #[test]
    fn a_message_cannot_steer_the_terminal() {
        let mut table = Table::new(&["MESSAGE"]);
        table.row(vec!["\x1b[2Jgone".into()]);
        assert_eq!(table.render(false), "MESSAGE\n [2Jgone\n");
    }

    #[test]
    fn ages() {
        let now = Timestamp::from_micros(1_000_000_000_000_000);
        let ago = |s: i64| age(Timestamp::from_micros(now.as_micros() - s * 1_000_000), now);
        assert_eq!([ago(0), ago(119), ago(120), ago(7199)], ["0s", "119s", "2m", "119m"]);
        assert_eq!([ago(7200), ago(172_799), ago(172_800), ago(-5)], ["2h", "47h", "2d", "0s"]);
        assert_eq!(age(Timestamp::EPOCH, now), "");
    }
}
