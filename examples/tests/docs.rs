//! Links and tables of the documentation name files and functions that exist.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The Markdown files at the root and below docs/, each with its folder.
fn documents() -> Vec<(PathBuf, String)> {
    let folders = [root(), root().join("docs"), root().join("docs/decisions")];
    let files = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    let files = files.map(|file| file.unwrap().path());
    let texts = files.filter(|path| path.extension().is_some_and(|kind| kind == "md"));
    texts
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect()
}

/// Targets of `[text](target)` inside the repository, without their fragments.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains("://"))
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn is_path(word: &str) -> bool {
    word.contains('/')
        && [".rs", ".c", ".md", ".sh", ".py"]
            .iter()
            .any(|end| word.ends_with(end))
}

/// Whether a file defines a function or a type of this name, or has it as a text of its own.
fn names(file: &Path, name: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let ways = [
        format!("fn {name}("),
        format!("enum {name} "),
        format!("\"{name}\""),
    ];
    let ways = ways
        .into_iter()
        .chain([format!("fn {name}<"), format!("int {name}(")]);
    ways.into_iter().any(|way| text.contains(&way))
}

#[test]
fn links_lead_to_files() {
    let mut broken = Vec::new();
    for (path, text) in documents() {
        let folder = path.parent().unwrap();
        let missing = links(&text).filter(|link| !folder.join(link).exists());
        broken.extend(missing.map(|link| format!("{}: {link}", path.display())));
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn functions_on_the_way_of_a_byte_are_where_the_map_says() {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let section = text.split("## Follow a byte").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let (mut rows, mut wrong) = (0, Vec::new());
    for line in section.lines().filter(|line| line.contains("](")) {
        let file = root().join("docs").join(links(line).next().unwrap());
        for name in quoted(line.rsplit('|').nth(1).unwrap()) {
            rows += 1;
            if !names(&file, name) {
                wrong.push(format!("{name} is not in {}", file.display()));
            }
        }
    }
    assert!(
        wrong.is_empty() && rows > 15,
        "{rows} functions, of which {wrong:#?}"
    );
}

#[test]
fn contributing_names_what_exists() {
    let text = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let mut wrong: Vec<_> = quoted(&text)
        .filter(|word| is_path(word) && !word.contains([' ', '*']))
        .filter(|path| path.contains("src/") && !root().join(path).exists())
        .map(ToOwned::to_owned)
        .collect();
    let section = text.split("## Ten questions").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let answers = section.lines().filter(|line| line.contains("? | "));
    let mut questions = 0;
    for line in answers {
        questions += 1;
        let answer: Vec<_> = quoted(line.split("? | ").nth(1).unwrap()).collect();
        let named = answer
            .windows(2)
            .filter(|pair| !is_path(pair[0]) && is_path(pair[1]));
        for pair in named {
            if !names(&root().join(pair[1]), pair[0]) {
                wrong.push(format!("{} is not in {}", pair[0], pair[1]));
            }
        }
    }
    assert_eq!(questions, 10);
    assert!(wrong.is_empty(), "{wrong:#?}");
}
