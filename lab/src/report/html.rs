//! Reports as self-contained pages: nothing is loaded from anywhere, pictures are inline. Whatever a
//! report says is escaped by the templates (maud) or by the pictures' writer.

mod frame;
mod run;

use maud::{PreEscaped, html};

use crate::report::chart;
use crate::report::terminal;
use frame::{drawn, page};

pub use run::throughput;

/// A page for a report that consists mainly of tables: pictures, and the report in Markdown.
///
/// Omits the report's own title, because the page has one.
pub fn plain(title: &str, pictures: &[chart::Figure], markdown: &str) -> String {
    let markdown = match markdown.strip_prefix("# ") {
        Some(titled) => titled.split_once('\n').map_or("", |(_, rest)| rest),
        None => markdown,
    };
    page(
        title,
        &html! {
            h1 { (title) }
            @if !pictures.is_empty() {
                div.figures { @for picture in pictures { (drawn(picture)) } }
            }
            (PreEscaped(terminal::html(markdown)))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_asks_nobody_for_anything() {
        let html = plain("a <b> title", &[], "**a** <script>alert(1)</script>");
        assert!(html.contains("<strong>a</strong>"), "{html}");
        assert!(html.contains("a &lt;b&gt; title"), "{html}");
        assert!(!html.contains("<script"), "{html}");
        assert!(
            !html.contains("http://") && !html.contains("https://"),
            "{html}"
        );
    }
}
