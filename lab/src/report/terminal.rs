//! Text for people on a terminal: wrapped to its width, coloured if it supports colours, and never cut
//! off.
//!
//! Reports are written in Markdown (`report.md`). On a terminal the same text has neither asterisks nor
//! bars, and a table that is too wide becomes a list. Files and pipes get 80 columns without colours,
//! always the same.

use std::fmt::Write;
use std::io::{self, IsTerminal};

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, ColumnConstraint, ContentArrangement, LineStyle, Table, Width};
use pulldown_cmark::{Alignment, Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use terminal_size::terminal_size_of;
use textwrap::core::display_width;
use textwrap::{Options as Wrapping, WordSplitter};

/// Width of output that is not a terminal, and of a terminal that does not report its width.
const COLUMNS: usize = 80;
/// Minimum width for readable text, and maximum width for lines of prose.
const NARROWEST: usize = 20;
const WIDEST: usize = 120;
/// Gap between the columns of a table.
const GAP: u16 = 2;

/// Where text is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Screen {
    pub width: usize,
    pub colours: bool,
}

impl Screen {
    /// A file, or a pipe to another program.
    pub const PLAIN: Self = Self {
        width: COLUMNS,
        colours: false,
    };

    /// This program's stdout.
    pub fn stdout() -> Self {
        let stdout = io::stdout();
        if !stdout.is_terminal() {
            return Self::PLAIN;
        }
        let columns = terminal_size_of(&stdout).map_or(0, |(width, _)| usize::from(width.0));
        Self {
            width: match columns {
                0 => COLUMNS,
                columns => columns.clamp(NARROWEST, WIDEST),
            },
            colours: penstock_process::colours::are_wanted(&stdout),
        }
    }

    fn bold(self, text: &str) -> String {
        match self.colours {
            true => format!("\x1b[1m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}

/// Wraps lines of plain text; continuation lines are indented below their first line.
pub fn fit(text: &str, screen: Screen) -> String {
    let lines = text.lines().map(|line| {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        let (indent, deeper) = (" ".repeat(indent), " ".repeat(indent + hanging(content)));
        wrap(content, &indent, &deeper, screen)
    });
    lines.map(|line| line + "\n").collect()
}

/// Hanging indent of a line: after its mark, if it has one.
fn hanging(content: &str) -> usize {
    match content.split_once(' ') {
        Some((mark, _)) if mark.len() <= 2 => mark.len() + 1,
        _ => 2,
    }
}

/// Wraps one paragraph without breaking words.
pub fn wrap(text: &str, first: &str, further: &str, screen: Screen) -> String {
    let options = Wrapping::new(screen.width)
        .initial_indent(first)
        .subsequent_indent(further)
        .word_splitter(WordSplitter::NoHyphenation)
        .break_words(false);
    textwrap::fill(text, options)
}

/// A command to be copied, with the comment after its `#`. If it is broken into lines, it still runs.
pub fn command(text: &str, indent: &str, screen: Screen) -> String {
    let (command, comment) = match text.split_once("  # ") {
        Some((command, comment)) => (command.trim_end(), Some(comment)),
        None => (text, None),
    };
    let mut out = String::new();
    let mut column = 0;
    for (number, word) in shell_words(command).into_iter().enumerate() {
        let width = display_width(word);
        if number == 0 {
            let _ = write!(out, "{indent}{word}");
            column = indent.len() + width;
        } else if column + 1 + width + 2 > screen.width {
            let _ = write!(out, " \\\n{indent}{word}");
            column = indent.len() + width;
        } else {
            let _ = write!(out, " {word}");
            column += 1 + width;
        }
    }
    if let Some(comment) = comment {
        let mark = format!("{indent}# ");
        let _ = write!(out, "\n{}", wrap(comment, &mark, &mark, screen));
    }
    out
}

/// Pieces of a command between which a line can be continued: not inside quotes.
fn shell_words(command: &str) -> Vec<&str> {
    let (mut words, mut start, mut quote) = (Vec::new(), 0, None);
    for (at, c) in command.char_indices() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, ' ') => {
                words.push(&command[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    words.push(&command[start..]);
    words.retain(|word| !word.is_empty());
    words
}

fn parser(markdown: &str) -> Parser<'_> {
    Parser::new_ext(markdown, Options::ENABLE_TABLES)
}

/// Renders a Markdown report as text.
pub fn markdown(markdown: &str, screen: Screen) -> String {
    let mut writer = Writer {
        screen,
        out: String::new(),
        text: String::new(),
        lists: Vec::new(),
        item: None,
        code: false,
        table: None,
    };
    for event in parser(markdown) {
        writer.event(event);
    }
    writer.out.trim_end().to_owned()
}

/// Renders a Markdown report as part of a page. Markup in it is shown as text; pictures and links are
/// omitted.
pub fn html(markdown: &str) -> String {
    let mut pictures = 0_u32;
    let events = parser(markdown).filter_map(|event| match event {
        Event::Start(Tag::Image { .. }) => {
            pictures += 1;
            None
        }
        Event::End(TagEnd::Image) => {
            pictures -= 1;
            None
        }
        // A picture's name is useless without the picture.
        _ if pictures > 0 => None,
        Event::Html(text) | Event::InlineHtml(text) => Some(Event::Text(text)),
        Event::Start(Tag::Link { .. }) | Event::End(TagEnd::Link) => None,
        event => Some(event),
    });
    let events = events.flat_map(|event| match event {
        // Wide tables scroll on their own.
        Event::Start(Tag::Table(columns)) => vec![
            Event::Html("<div class=\"scroll\">".into()),
            Event::Start(Tag::Table(columns)),
        ],
        Event::End(TagEnd::Table) => {
            vec![Event::End(TagEnd::Table), Event::Html("</div>".into())]
        }
        event => vec![event],
    });
    let mut html = String::new();
    pulldown_cmark::html::push_html(&mut html, events);
    html
}

/// Assembles a report, block by block.
struct Writer {
    screen: Screen,
    out: String,
    /// Text of the current block.
    text: String,
    /// Numbers of the open lists; `None` for one without numbers.
    lists: Vec<Option<u64>>,
    /// Mark of the list item that is about to begin.
    item: Option<String>,
    code: bool,
    table: Option<Rows>,
}

#[derive(Default)]
struct Rows {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Writer {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) | Event::Code(text) | Event::Html(text) | Event::InlineHtml(text) => {
                self.text += &text;
            }
            Event::SoftBreak => self.text.push(' '),
            Event::HardBreak => self.text.push('\n'),
            _ => {}
        }
    }

    fn start(&mut self, tag: Tag<'_>) {
        match tag {
            Tag::List(number) => {
                self.flush();
                self.lists.push(number);
            }
            Tag::Item => {
                let mark = match self.lists.last_mut() {
                    Some(Some(number)) => {
                        *number += 1;
                        format!("{}. ", *number - 1)
                    }
                    _ => "- ".to_owned(),
                };
                self.item = Some(mark);
            }
            Tag::Strong if self.screen.colours && self.table.is_none() => self.text += "\x1b[1m",
            Tag::CodeBlock(_) => self.code = true,
            Tag::Table(columns) => {
                let right = columns.iter().map(|column| *column == Alignment::Right);
                self.table = Some(Rows {
                    right: right.collect(),
                    rows: Vec::new(),
                });
            }
            Tag::TableHead | Tag::TableRow => {
                if let Some(table) = &mut self.table {
                    table.rows.push(Vec::new());
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => {
                let title = std::mem::take(&mut self.text);
                let title = wrap(&title, "", "", self.screen);
                self.block(&self.screen.bold(&title));
                if level == HeadingLevel::H1 {
                    let rule = "=".repeat(display_width(&title).min(self.screen.width));
                    let _ = writeln!(self.out, "{rule}");
                }
            }
            TagEnd::Paragraph | TagEnd::Item => self.flush(),
            TagEnd::List(_) => {
                self.lists.pop();
            }
            TagEnd::Strong if self.screen.colours && self.table.is_none() => {
                self.text += "\x1b[0m";
            }
            TagEnd::CodeBlock => {
                self.code = false;
                let code = std::mem::take(&mut self.text);
                let lines = code.lines().map(|line| command(line, "  ", self.screen));
                let lines: Vec<_> = lines.collect();
                self.block(&lines.join("\n"));
            }
            // A picture's name is useless without the picture.
            TagEnd::Image => self.text.clear(),
            TagEnd::TableCell => {
                let cell = std::mem::take(&mut self.text);
                if let Some(row) = self.table.as_mut().and_then(|table| table.rows.last_mut()) {
                    row.push(cell);
                }
            }
            TagEnd::Table => {
                if let Some(rows) = self.table.take() {
                    let table = table(&rows, self.screen);
                    self.block(&table);
                }
            }
            _ => {}
        }
    }

    /// Ends a paragraph or a list item.
    fn flush(&mut self) {
        let text = std::mem::take(&mut self.text);
        if text.is_empty() {
            return;
        }
        if self.lists.is_empty() {
            let text = wrap(&text, "", "", self.screen);
            self.block(&text);
            return;
        }
        let deep = "  ".repeat(self.lists.len() - 1);
        let mark = self.item.take().unwrap_or_else(|| "  ".to_owned());
        let further = format!("{deep}{}", " ".repeat(mark.len()));
        let text = wrap(&text, &format!("{deep}{mark}"), &further, self.screen);
        let _ = writeln!(self.out, "{text}");
    }

    /// Writes a block, after an empty line.
    fn block(&mut self, text: &str) {
        if !self.out.is_empty() {
            self.out.push('\n');
        }
        let _ = writeln!(self.out, "{text}");
    }
}

/// A table that fits, with cells wrapped between words; if that does not suffice, a list of rows.
fn table(rows: &Rows, screen: Screen) -> String {
    let Some((head, body)) = rows.rows.split_first() else {
        return String::new();
    };
    let mut narrowest: Vec<u16> = (0..head.len())
        .map(|column| {
            let cells = rows.rows.iter().filter_map(|row| row.get(column));
            let words = cells.flat_map(|cell| cell.split(' '));
            words.map(display_width).max().unwrap_or(0) as u16
        })
        .collect();
    let least: usize = narrowest.iter().map(|width| usize::from(width + GAP)).sum();
    if least > screen.width + usize::from(GAP) {
        return records(head, body, screen);
    }
    // The subject of a row is on one line, if there is room.
    let names = rows.rows.iter().filter_map(|row| row.first());
    let names = names
        .map(|name| display_width(name) as u16)
        .max()
        .unwrap_or(0);
    if least - usize::from(narrowest[0]) + usize::from(names) <= screen.width {
        narrowest[0] = names;
    }
    let mut table = Table::new();
    table
        .load_style(NOTHING.header_separator(LineStyle::none().fill('─').junction('─')))
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width((screen.width + usize::from(GAP)) as u16)
        .set_header(head.iter().map(Cell::new));
    for row in body {
        table.add_row(row.iter().map(Cell::new));
    }
    for (column, width) in table.column_iter_mut().zip(narrowest) {
        column.set_padding((0, GAP));
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width + GAP)));
    }
    let right = rows.right.iter().enumerate().filter(|(_, right)| **right);
    for (number, _) in right {
        if let Some(column) = table.column_mut(number) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| {
        let rule = line.chars().all(|c| c == '─');
        match rule {
            true => line.chars().take(screen.width).collect(),
            false => line.trim_end().to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Each row as lines of names and values.
fn records(head: &[String], body: &[Vec<String>], screen: Screen) -> String {
    let widest = head
        .iter()
        .map(|name| display_width(name))
        .max()
        .unwrap_or(0);
    let widest = widest.min(screen.width / 2);
    let of_row = |row: &Vec<String>| {
        let cells = head.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
        let lines = cells.map(|(name, cell)| {
            let first = format!("{name:widest$}  ");
            wrap(cell, &first, &" ".repeat(widest + 2), screen)
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    body.iter().map(of_row).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NARROW: Screen = Screen {
        width: 40,
        colours: false,
    };

    fn widest(text: &str) -> usize {
        text.lines().map(display_width).max().unwrap_or(0)
    }

    #[test]
    fn a_report_has_no_marks_of_markdown_and_fits() {
        let text = "# Title\n\nA paragraph with a **bold** word and `code` that is longer than a line is.\n\n\
                    ![Picture](a.svg)\n\n| what | value |\n|---|---|\n| one | **7** of a long row of words that wraps |\n\n\
                    - an item that is longer than one line of the terminal\n- two\n\n```sh\nls -l 'a b' and many more words that make it long\n```\n";
        let shown = markdown(text, NARROW);
        assert!(
            !shown.contains("**") && !shown.contains('|') && !shown.contains('`'),
            "{shown}"
        );
        assert!(!shown.contains("Picture"), "{shown}");
        assert!(widest(&shown) <= 40, "{shown}");
        assert!(
            shown.contains("  ls -l 'a b'") && shown.contains(" \\\n"),
            "{shown}"
        );
        for word in ["Title", "bold", "row of words", "terminal", "two"] {
            assert!(shown.replace("\n  ", " ").contains(word), "{word}: {shown}");
        }
        let coloured = markdown(
            text,
            Screen {
                colours: true,
                ..NARROW
            },
        );
        assert!(coloured.contains("\x1b[1mbold\x1b[0m"), "{coloured}");
    }

    #[test]
    fn a_table_without_room_becomes_a_list_and_no_word_is_broken() {
        let text =
            "| rcv_ssthresh_first | rcv_ssthresh_final |\n|---|---|\n| 1234567890123 | x |\n";
        let narrow = Screen {
            width: 35,
            ..NARROW
        };
        let shown = markdown(text, narrow);
        assert!(
            shown.contains("rcv_ssthresh_first  1234567890123"),
            "{shown}"
        );
        let wide = markdown(text, Screen::PLAIN);
        assert!(
            wide.lines().next().unwrap().ends_with("rcv_ssthresh_final"),
            "{wide}"
        );
    }

    #[test]
    fn markup_in_a_report_stays_text_on_a_page() {
        let page = html(
            "| a | b |\n|---|---|\n| <script>x</script> | [l](javascript:x) ![i](http://e) |\n",
        );
        assert!(
            page.contains("<table>") && page.contains("&lt;script&gt;"),
            "{page}"
        );
        assert!(!html("![Medians](a.svg)").contains("Medians"));
        assert!(
            !page.contains("<script") && !page.contains("href") && !page.contains("<img"),
            "{page}"
        );
    }

    #[test]
    fn commands_still_run_after_they_were_broken_up() {
        let text = "sudo strace -f -c -e trace='network and read' -p 12345  # a comment that is long enough to wrap as well";
        let shown = command(text, "  ", NARROW);
        assert!(widest(&shown) <= 40, "{shown}");
        let code: Vec<_> = shown
            .lines()
            .filter(|line| !line.trim().starts_with('#'))
            .collect();
        assert!(
            code[..code.len() - 1]
                .iter()
                .all(|line| line.ends_with('\\')),
            "{shown}"
        );
        assert!(shown.contains("'network and read'"), "{shown}");
    }

    #[test]
    fn lines_hang_behind_their_mark() {
        let shown = fit("   + evidence that is longer than one line\n", NARROW);
        assert_eq!(shown, "   + evidence that is longer than one\n     line\n");
    }
}
