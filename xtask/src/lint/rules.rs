//! The smaller rules of the sources: sizes, `unsafe`, words that mean unfinished work, who reads YAML.
//!
//! Each rule is a pure function of one file, tested below. Comments and strings are code to none of them but the rule
//! of words, for which comments are the point.

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::source::{Finding, Level, SourceFile};

/// A file with more lines than this holds more than one thing.
const FILE_LINES: usize = 499;

/// A function with more lines than this does more than one thing.
const FUNCTION_LINES: usize = 49;

/// Where the kernel is talked to, and memory is shared with it; everything else of the product is safe Rust.
const MAY_BE_UNSAFE: [&str; 3] = ["mesh-agent/src/capture/", "mesh-common/src/", "mesh-ebpf/src/"];

/// The files of the lab that look into the kernel past the product, share memory with it, make what it has no safe call
/// for, or start processes inside a namespace.
const LAB_MAY_BE_UNSAFE: [&str; 6] = [
    "tests/src/bpf.rs",
    "tests/src/foreign.rs",
    "tests/src/guest.rs",
    "tests/src/process.rs",
    "tests/src/uring.rs",
    "tests/tests/map_inspection.rs",
];

/// The only file that reads YAML, so that the library can be replaced in one place.
const READS_YAML: &str = "mesh-agent/src/source/file.rs";

/// Words of unfinished work, put together here so that this file does not hold them.
const WORDS: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];

/// Macros of unfinished work.
const MACROS: [&str; 2] = ["todo", "unimplemented"];

/// All findings of these rules in a file.
pub fn check(file: &SourceFile) -> Vec<Finding> {
    let mut findings = Vec::new();
    file_length(file, &mut findings);
    words(file, &mut findings);
    tokens(file, &file.tokens, &mut findings);
    findings
}

fn file_length(file: &SourceFile, findings: &mut Vec<Finding>) {
    let lines = file.text.lines().count();
    if lines > FILE_LINES {
        let message =
            format!("{lines} lines; a file has fewer than {}: split it by what it does", FILE_LINES + 1);
        findings.push(file.finding(Level::Error, lines, message));
    }
}

fn words(file: &SourceFile, findings: &mut Vec<Finding>) {
    for (number, line) in file.text.lines().enumerate() {
        let mut parts = line.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        if let Some(word) = parts.find(|part| WORDS.contains(part)) {
            let message = format!("`{word}`: do it, or write down as a plain sentence what does not work");
            findings.push(file.finding(Level::Error, number + 1, message));
        }
    }
}

fn tokens(file: &SourceFile, stream: &TokenStream, findings: &mut Vec<Finding>) {
    let trees: Vec<TokenTree> = stream.clone().into_iter().collect();
    for (at, tree) in trees.iter().enumerate() {
        match tree {
            TokenTree::Ident(word) => {
                let line = word.span().start().line;
                let next = trees.get(at + 1);
                if let Some(message) = forbidden(&file.path, &word.to_string(), next) {
                    findings.push(file.finding(Level::Error, line, message));
                }
                if word == "fn" {
                    function_length(file, line, &trees[at + 1..], findings);
                }
            }
            TokenTree::Group(group) => {
                if is_ignore(&trees[..at], group.delimiter(), &group.stream()) {
                    let line = group.span_open().start().line;
                    let message = "a test that never runs: run it, or skip at run time and print the reason";
                    findings.push(file.finding(Level::Error, line, message));
                }
                tokens(file, &group.stream(), findings);
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

fn forbidden(path: &str, word: &str, next: Option<&TokenTree>) -> Option<String> {
    let is_macro = matches!(next, Some(TokenTree::Punct(punct)) if punct.as_char() == '!');
    let may_be_unsafe =
        MAY_BE_UNSAFE.iter().any(|room| path.starts_with(room)) || LAB_MAY_BE_UNSAFE.contains(&path);
    if word == "unsafe" && !may_be_unsafe {
        let places = MAY_BE_UNSAFE.join(", ");
        return Some(format!(
            "`unsafe` belongs only in {places} (and the lab's files named in xtask/src/lint/rules.rs)"
        ));
    }
    if word == "serde_yaml" && path != READS_YAML {
        return Some(format!("only {READS_YAML} reads YAML: take typed resources from it"));
    }
    (is_macro && MACROS.contains(&word)).then(|| format!("`{word}!`: a path that panics is no result"))
}

/// `#[ignore]`, `#[ignore = "…"]`, and the same under `cfg_attr`.
fn is_ignore(before: &[TokenTree], delimiter: Delimiter, inside: &TokenStream) -> bool {
    let hash = matches!(before.last(), Some(TokenTree::Punct(punct)) if punct.as_char() == '#');
    if !hash || delimiter != Delimiter::Bracket {
        return false;
    }
    let mut names = inside.clone().into_iter();
    match names.next() {
        Some(TokenTree::Ident(name)) if name == "ignore" => true,
        Some(TokenTree::Ident(name)) if name == "cfg_attr" => names.any(|tree| match tree {
            TokenTree::Group(group) => group
                .stream()
                .into_iter()
                .any(|tree| matches!(tree, TokenTree::Ident(name) if name == "ignore")),
            _ => false,
        }),
        _ => false,
    }
}

fn function_length(file: &SourceFile, line: usize, after: &[TokenTree], findings: &mut Vec<Finding>) {
    // `fn(` is a type, not a function.
    let Some(TokenTree::Ident(name)) = after.first() else { return };
    for tree in after {
        match tree {
            TokenTree::Punct(punct) if punct.as_char() == ';' => return,
            TokenTree::Group(body) if body.delimiter() == Delimiter::Brace => {
                let lines = body.span_close().end().line + 1 - line;
                if lines > FUNCTION_LINES {
                    let limit = FUNCTION_LINES + 1;
                    let message = format!("`{name}` has {lines} lines; a function has fewer than {limit}");
                    findings.push(file.finding(Level::Warning, line, message));
                }
                return;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;

    fn found(path: &str, text: &str) -> Result<Vec<(usize, Level)>> {
        let findings = check(&SourceFile::new(path, text.to_owned())?);
        Ok(findings.into_iter().map(|finding| (finding.line, finding.level)).collect())
    }

    #[test]
    fn files_and_functions_have_a_limit() -> Result<()> {
        let longest = "\n".repeat(499);
        assert_eq!(found("a.rs", &longest)?, []);
        assert_eq!(found("a.rs", &(longest + "\n"))?, [(500, Level::Error)]);
        let function = |lines: usize| format!("\nfn f() -> u8 {{{}1 }}", "\n".repeat(lines - 1));
        assert_eq!(found("a.rs", &function(49))?, []);
        assert_eq!(found("a.rs", &function(50))?, [(2, Level::Warning)]);
        Ok(())
    }

    #[test]
    fn a_function_type_and_a_declaration_have_no_body() -> Result<()> {
        let text = format!("trait T {{ fn f(&self) -> fn(u8) -> u8; }}\nmod m {{{}}}", "\n".repeat(60));
        assert_eq!(found("a.rs", &text)?, []);
        Ok(())
    }

    #[test]
    fn unsafe_is_for_the_kernels_neighbours() -> Result<()> {
        let text = "fn f() {\n    unsafe { g() }\n}";
        assert_eq!(found("mesh-agent/src/proxy/http.rs", text)?, [(2, Level::Error)]);
        assert_eq!(found("mesh-agent/src/capture/netns.rs", text)?, []);
        assert_eq!(found("tests/src/lab.rs", text)?, [(2, Level::Error)]);
        assert_eq!(found("tests/src/bpf.rs", text)?, []);
        assert_eq!(found("mesh-agent/src/proxy/http.rs", "// unsafe\nconst A: &str = \"unsafe\";")?, []);
        Ok(())
    }

    #[test]
    fn one_file_reads_yaml() -> Result<()> {
        assert_eq!(found("mesh-agent/src/config.rs", "use serde_yaml::Value;")?, [(1, Level::Error)]);
        assert_eq!(found("mesh-agent/src/source/file.rs", "use serde_yaml::Value;")?, []);
        Ok(())
    }

    #[test]
    fn unfinished_work_is_found_in_comments_and_code() -> Result<()> {
        let comment = format!("// {}: later\n// {}ER\n", WORDS[0], WORDS[0]);
        assert_eq!(found("a.rs", &comment)?, [(1, Level::Error)]);
        assert_eq!(found("a.rs", &format!("fn f() {{ {}!() }}", MACROS[1]))?, [(1, Level::Error)]);
        assert_eq!(found("a.rs", "fn todo() {}")?, []);
        Ok(())
    }

    #[test]
    fn tests_that_never_run_are_found() -> Result<()> {
        let error = [(1, Level::Error)];
        assert_eq!(found("a.rs", "#[ignore] fn f() {}")?, error);
        assert_eq!(found("a.rs", "#[ignore = \"slow\"] fn f() {}")?, error);
        assert_eq!(found("a.rs", "#[cfg_attr(debug_assertions, ignore)] fn f() {}")?, error);
        assert_eq!(found("a.rs", "fn f(ignore: [u8; 1]) { let _ = [ignore]; }")?, []);
        Ok(())
    }
}
