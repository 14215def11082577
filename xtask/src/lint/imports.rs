//! The import law of mesh-agent: which room may use which.
//!
//! `proxy` tells the story and may use every room; rooms use the shared nouns, and one another only along the arrows of
//! a connection's path; nothing uses `proxy` or `app`. A pure function of one file; absolute paths (`crate::`) and
//! relative ones that leave their room (`super::`) both count. Tested below.

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::source::{Finding, Level, SourceFile};

/// Where the law holds. `main.rs` and `bin/` start what `app` composes, and are other crates.
const ROOT: &str = "mesh-agent/src/";

/// What every room may use. `identity::SpiffeId` is a noun of configuration; the rest of `identity` is a room.
const SHARED: &[&str] = &[
    "body",
    "config",
    "drain",
    "error",
    "grpc",
    "identity::SpiffeId",
    "mounts",
    "report",
    "state",
    "watcher",
    "workers",
];

/// The arrows: who uses whom, besides [`SHARED`].
const ARROWS: &[(&str, &[&str])] = &[
    // the path, in its order
    ("capture", &[]),
    ("identity", &[]),
    ("detect", &["copy"]),
    ("route", &[]),
    ("policy", &["identity", "route"]),
    ("balance", &["route"]),
    ("limit", &["route"]),
    ("upstream", &["balance", "capture", "copy", "http2", "identity", "policy", "tunnel"]),
    ("tunnel", &["copy", "http2", "identity"]),
    ("copy", &[]),
    ("http1", &[]),
    ("http2", &["copy"]),
    ("overload", &[]),
    // around the path
    ("admin", &["balance", "capture", "identity", "source", "upstream"]),
    ("handover", &["admin", "capture"]),
    ("cni", &["admin", "identity::write_over"]),
    ("source", &[]),
    ("controller", &["identity", "source"]),
    ("ctl", &["admin", "capture::inspect", "cni::install", "source::definitions", "source::validate"]),
];

/// The shared nouns themselves, each with all it may use: they stand below the rooms.
const NOUNS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("drain", &[]),
    ("grpc", &[]),
    ("mounts", &[]),
    ("watcher", &[]),
    ("workers", &[]),
    ("body", &["error"]),
    // Flags name the options of the rooms they are for.
    (
        "config",
        &[
            "admin::Address",
            "admin::SOCKET_NAME",
            "body::Stall",
            "capture::EbpfLog",
            "capture::PodTables",
            "capture::WhenAgentIsDown",
            "ctl::Output",
            "error",
            "report::AccessLog",
            "state::defaults",
            "state::snapshot::PathNormalization",
            "state::snapshot::Subnet",
        ],
    ),
    ("state", &["error", "identity::SpiffeId"]),
    ("report", &["error", "identity::SpiffeId", "state"]),
];

/// These may use everything, and nothing may use them (`app` and `enrolment` compose `proxy` too).
const TOP: [&str; 3] = ["app", "enrolment", "proxy"];

/// The breaches of the law in a file.
pub fn check(file: &SourceFile) -> Vec<Finding> {
    let Some(module) = module(&file.path) else { return Vec::new() };
    let Some(room) = module.first().cloned() else { return Vec::new() };
    // Tests may take what they test with from any room.
    if module.iter().any(|part| part == "tests") {
        return Vec::new();
    }
    let mut paths = Paths { module, found: Vec::new() };
    paths.walk(&file.tokens);
    let mut findings = Vec::new();
    if !is_known(&room) {
        let message =
            format!("`{room}` is not in the table of xtask/src/lint/imports.rs: say there what it may use");
        findings.push(file.finding(Level::Error, 1, message));
        return findings;
    }
    for (line, path) in paths.found {
        if !allowed(&room, &path) {
            let message = format!(
                "`{room}` may not use `crate::{}`: the import law has no such arrow (xtask/src/lint/imports.rs)",
                path.join("::")
            );
            findings.push(file.finding(Level::Error, line, message));
        }
    }
    findings
}

fn allowed(room: &str, path: &[String]) -> bool {
    let Some(target) = path.first() else { return true };
    // What is no module of the table is an item of the crate's root, or a room that is reported by itself.
    if target == room || !is_known(target) {
        return true;
    }
    if TOP.contains(&target.as_str()) {
        return room == "app" || (room == "enrolment" && target == "proxy");
    }
    if TOP.contains(&room) {
        return true;
    }
    let covers = |arrow: &str| {
        arrow.split("::").zip(path).filter(|(want, is)| want == is).count() == arrow.split("::").count()
    };
    if let Some((_, uses)) = NOUNS.iter().find(|(noun, _)| *noun == room) {
        return uses.iter().any(|arrow| covers(arrow));
    }
    let arrows = ARROWS.iter().find(|(from, _)| *from == room).map_or(&[][..], |(_, uses)| *uses);
    SHARED.iter().chain(arrows).any(|arrow| covers(arrow))
}

fn is_known(module: &str) -> bool {
    let named = |(name, _): &(&str, &[&str])| *name == module;
    TOP.contains(&module) || ARROWS.iter().any(named) || NOUNS.iter().any(named)
}

/// The module that a file is; `None` outside the law, empty for the crate's root.
fn module(path: &str) -> Option<Vec<String>> {
    let path = path.strip_prefix(ROOT)?.strip_suffix(".rs")?;
    if path == "main" || path.starts_with("bin/") {
        return None;
    }
    let mut module: Vec<String> = path.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|name| name == "mod" || name == "lib") {
        module.pop();
    }
    Some(module)
}

/// Collects the paths from the crate's root that a file's code names.
struct Paths {
    module: Vec<String>,
    found: Vec<(usize, Vec<String>)>,
}

impl Paths {
    fn walk(&mut self, stream: &TokenStream) {
        let trees: Vec<TokenTree> = stream.clone().into_iter().collect();
        let mut at = 0;
        while let Some(tree) = trees.get(at) {
            at += 1;
            match tree {
                TokenTree::Ident(word) if word == "mod" => at = self.inline_module(&trees, at),
                TokenTree::Ident(word) if word == "crate" && is_separator(&trees, at) => {
                    at = self.path(&trees, at + 2, &[]);
                }
                TokenTree::Ident(word) if word == "super" && is_separator(&trees, at) => {
                    at = self.relative(&trees, at - 1);
                }
                TokenTree::Group(group) => self.walk(&group.stream()),
                _ => {}
            }
        }
    }

    /// `mod name { … }`: one level deeper for `super::`. Returns where to go on.
    fn inline_module(&mut self, trees: &[TokenTree], at: usize) -> usize {
        let (Some(TokenTree::Ident(name)), Some(TokenTree::Group(body))) = (trees.get(at), trees.get(at + 1))
        else {
            return at;
        };
        self.module.push(name.to_string());
        self.walk(&body.stream());
        self.module.pop();
        at + 2
    }

    /// `super::super::name…`, from the first `super`.
    fn relative(&mut self, trees: &[TokenTree], mut at: usize) -> usize {
        let mut depth = self.module.len();
        while matches!(trees.get(at), Some(TokenTree::Ident(word)) if word == "super")
            && is_separator(trees, at + 1)
        {
            depth = depth.saturating_sub(1);
            at += 3;
        }
        let base = self.module[..depth].to_vec();
        self.path(trees, at, &base)
    }

    /// A path or use tree whose next segment is at `at`, below `prefix`. Returns where to go on.
    fn path(&mut self, trees: &[TokenTree], mut at: usize, prefix: &[String]) -> usize {
        let mut path = prefix.to_vec();
        let mut line = 0;
        loop {
            match trees.get(at) {
                Some(TokenTree::Ident(name)) => {
                    path.push(name.to_string());
                    line = name.span().start().line;
                    at += 1;
                    if !is_separator(trees, at) {
                        break;
                    }
                    at += 2;
                }
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    self.use_group(&group.stream(), &path);
                    return at + 1;
                }
                Some(TokenTree::Punct(punct)) if punct.as_char() == '*' => {
                    line = punct.span().start().line;
                    path.push("*".to_owned());
                    at += 1;
                    break;
                }
                // A turbofish, or the end.
                _ => break,
            }
        }
        self.found.push((line.max(1), path));
        at
    }

    /// The comma-separated trees inside the braces of a `use`.
    fn use_group(&mut self, stream: &TokenStream, prefix: &[String]) {
        let trees: Vec<TokenTree> = stream.clone().into_iter().collect();
        for element in trees.split(|tree| matches!(tree, TokenTree::Punct(punct) if punct.as_char() == ',')) {
            let itself = matches!(element.first(), Some(TokenTree::Ident(word)) if word == "self");
            if let (true, Some(first)) = (itself, element.first()) {
                self.found.push((first.span().start().line, prefix.to_vec()));
            } else if !element.is_empty() {
                self.path(element, 0, prefix);
            }
        }
    }
}

/// Whether `::` is at this place.
fn is_separator(trees: &[TokenTree], at: usize) -> bool {
    let colon = |at| matches!(trees.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
    colon(at) && colon(at + 1)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;

    fn breaches(path: &str, text: &str) -> Result<Vec<String>> {
        let findings = check(&SourceFile::new(path, text.to_owned())?);
        let target = |message: &str| message.split('`').nth(3).unwrap_or(message).to_owned();
        Ok(findings
            .into_iter()
            .map(|finding| format!("{} {}", finding.line, target(&finding.message)))
            .collect())
    }

    #[test]
    fn the_story_may_use_every_room_and_nobody_the_story() -> Result<()> {
        let story = "use crate::{capture::Captured, route, tunnel::{self, Wire}};";
        assert_eq!(breaches("mesh-agent/src/proxy/outbound.rs", story)?, [""; 0]);
        assert_eq!(breaches("mesh-agent/src/app.rs", "use crate::proxy::outbound;")?, [""; 0]);
        let user = "use crate::proxy::http;\nfn f() { crate::app::run() }";
        let expected = ["1 crate::proxy::http", "2 crate::app::run"];
        for room in ["route/mod.rs", "error.rs", "admin.rs", "upstream/pool.rs"] {
            assert_eq!(breaches(&format!("mesh-agent/src/{room}"), user)?, expected, "{room}");
        }
        assert_eq!(breaches("mesh-agent/src/proxy/http.rs", "use crate::app;")?, ["1 crate::app"]);
        Ok(())
    }

    #[test]
    fn rooms_use_shared_nouns_and_their_arrows() -> Result<()> {
        let cases: [(&str, &str, &[&str]); 7] = [
            ("tunnel/mod.rs", "use crate::{body::Body, error::Result, identity::WorkloadIdentity};", &[]),
            ("tunnel/mod.rs", "use crate::upstream::Lease;", &["1 crate::upstream::Lease"]),
            ("upstream/mod.rs", "use crate::{policy::Permit, balance::Chosen, tunnel};", &[]),
            (
                "route/mod.rs",
                "use crate::{\n    identity::SpiffeId,\n    balance::Chosen,\n};",
                &["3 crate::balance::Chosen"],
            ),
            (
                "route/mod.rs",
                "use crate::identity::{SpiffeId, Authority};",
                &["1 crate::identity::Authority"],
            ),
            (
                "state/snapshot.rs",
                "use crate::{identity::SpiffeId, report::Side};",
                &["1 crate::report::Side"],
            ),
            ("error.rs", "use crate::state::snapshot::Workload;", &["1 crate::state::snapshot::Workload"]),
        ];
        for (file, text, expected) in cases {
            assert_eq!(breaches(&format!("mesh-agent/src/{file}"), text)?, expected, "{file}: {text}");
        }
        Ok(())
    }

    #[test]
    fn relative_paths_are_followed_out_of_the_room() -> Result<()> {
        let cases: [(&str, &str, &[&str]); 5] = [
            ("route/mod.rs", "use super::tunnel::Wire;", &["1 crate::tunnel::Wire"]),
            ("route/rewrite.rs", "use super::super::tunnel::Wire;", &["1 crate::tunnel::Wire"]),
            ("route/rewrite.rs", "use super::tunnel::Wire;", &[]),
            ("route/mod.rs", "mod tests { use super::*; use super::tunnel; }", &[]),
            (
                "detect.rs",
                "mod tests { mod more { use super::super::super::balance; } }",
                &["1 crate::balance"],
            ),
        ];
        for (file, text, expected) in cases {
            assert_eq!(breaches(&format!("mesh-agent/src/{file}"), text)?, expected, "{file}: {text}");
        }
        Ok(())
    }

    #[test]
    fn comments_strings_and_other_crates_are_no_imports() -> Result<()> {
        let text =
            "//! crate::proxy\n/* crate::proxy */ const A: &str = \"crate::proxy\";\nuse other::proxy::X;";
        assert_eq!(breaches("mesh-agent/src/route/mod.rs", text)?, [""; 0]);
        assert_eq!(breaches("tests/src/lib.rs", "use crate::proxy;")?, [""; 0]);
        assert_eq!(breaches("mesh-agent/src/bin/meshctl.rs", "use crate::proxy;")?, [""; 0]);
        assert_eq!(breaches("mesh-agent/src/lib.rs", "pub mod proxy;")?, [""; 0]);
        Ok(())
    }

    #[test]
    fn expressions_visibility_and_macros_count_too() -> Result<()> {
        let text =
            "fn f() { g(crate::balance::choose::<u8>(1)); select! { _ = crate::tunnel::connect() => {} } }";
        let expected = ["1 crate::balance::choose", "1 crate::tunnel::connect"];
        assert_eq!(breaches("mesh-agent/src/route/mod.rs", text)?, expected);
        assert_eq!(
            breaches("mesh-agent/src/route/mod.rs", "pub(in crate::route) fn f() {}\npub(crate) fn g() {}")?,
            [""; 0]
        );
        Ok(())
    }

    #[test]
    fn a_new_room_needs_a_row() -> Result<()> {
        assert_eq!(check(&SourceFile::new("mesh-agent/src/cache/mod.rs", String::new())?).len(), 1);
        Ok(())
    }
}
