//! What policies say is what a reader of Istio's reference would say: any policies about any request, against an evaluator
//! that knows nothing but the words as they are written.

use proptest::{collection::vec, prelude::*, sample::subsequence};
use serde_json::{Map, Value, json};

use super::*;

/// An attribute of a request: where it stands in a rule, and the words that are written about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attribute {
    Principal,
    Namespace,
    Ip,
    Method,
    Path,
    Port,
    Host,
    Team,
}

use Attribute::{Host, Ip, Method as Verb, Namespace, Path, Port, Principal, Team};

impl Attribute {
    const fn words(self) -> &'static [&'static str] {
        match self {
            Principal => &["cluster.local/ns/a/sa/x", "cluster.local/ns/a/*", "*/sa/y", "*"],
            Namespace => &["a", "b*", "*", "ab"],
            Ip => &["10.1.0.0/16", "10.2.0.1", "0.0.0.0/0"],
            Verb => &["GET", "P*", "*T"],
            Path => &["/a", "/a*", "*/b", "/{*}/b", "/{**}", "*"],
            Port => &["80", "81"],
            Host => &["app", "*.example.com", "shop.*", "*"],
            Team => &["red", "bl*", "*"],
        }
    }

    /// Its field, and that with `not`.
    const fn fields(self) -> (&'static str, &'static str) {
        match self {
            Principal => ("principals", "notPrincipals"),
            Namespace => ("namespaces", "notNamespaces"),
            Ip => ("ipBlocks", "notIpBlocks"),
            Verb => ("methods", "notMethods"),
            Path => ("paths", "notPaths"),
            Port => ("ports", "notPorts"),
            Host => ("hosts", "notHosts"),
            Team => ("values", "notValues"),
        }
    }
}

/// What is asked of one attribute.
#[derive(Debug, Clone)]
struct Asks {
    of: Attribute,
    one_of: Vec<&'static str>,
    none_of: Vec<&'static str>,
}

#[derive(Debug, Clone)]
struct WrittenRule {
    from: Vec<Vec<Asks>>,
    to: Vec<Vec<Asks>>,
    when: Vec<Asks>,
}

#[derive(Debug, Clone)]
struct Written {
    deny: bool,
    rules: Vec<WrittenRule>,
}

fn asks(of: Attribute) -> impl Strategy<Value = Asks> {
    let words = of.words().to_vec();
    let most = words.len();
    (subsequence(words.clone(), 0..=most), subsequence(words, 0..=1))
        .prop_filter("asks for nothing", |(one_of, none_of)| !one_of.is_empty() || !none_of.is_empty())
        .prop_map(move |(one_of, none_of)| Asks { of, one_of, none_of })
}

/// One or two of these attributes, each once.
fn part(attributes: &'static [Attribute]) -> impl Strategy<Value = Vec<Asks>> {
    subsequence(attributes.to_vec(), 1..=2)
        .prop_flat_map(|chosen| chosen.into_iter().map(asks).collect::<Vec<_>>())
}

fn rule() -> impl Strategy<Value = WrittenRule> {
    let from = vec(part(&[Principal, Namespace, Ip]), 0..=2);
    let to = vec(part(&[Verb, Path, Port, Host]), 0..=2);
    (from, to, vec(asks(Team), 0..=1)).prop_map(|(from, to, when)| WrittenRule { from, to, when })
}

fn policies() -> impl Strategy<Value = Vec<Written>> {
    let policy = (any::<bool>(), vec(rule(), 1..=3)).prop_map(|(deny, rules)| Written { deny, rules });
    vec(policy, 0..=4)
}

/// Who asks for what, as attributes; none where there is nothing.
#[derive(Debug, Clone)]
struct Request {
    who: Option<(&'static str, &'static str)>,
    ip: &'static str,
    port: &'static str,
    method: &'static str,
    path: &'static str,
    host: &'static str,
    team: Option<&'static str>,
}

fn request() -> impl Strategy<Value = Request> {
    let one = |words: &'static [&'static str]| proptest::sample::select(words);
    let who = proptest::option::of((one(&["a", "b", "ab"]), one(&["x", "y"])));
    let place = (one(&["10.1.0.1", "10.2.0.1"]), one(&["80", "81"]));
    let what = (one(&["GET", "POST", "PUT"]), one(&["/", "/a", "/a/b", "/ab", "/c/b", "/a/c/b"]));
    let host = one(&["app", "a.example.com", "shop.b", "example.com"]);
    (who, place, what, host, proptest::option::of(one(&["red", "blue", "b"]))).prop_map(
        |(who, (ip, port), (method, path), host, team)| Request { who, ip, port, method, path, host, team },
    )
}

impl Request {
    fn text(&self) -> String {
        let Self { who, ip, port, method, path, host, team } = self;
        let who = who.map(|(namespace, account)| format!("from {namespace}/{account} ")).unwrap_or_default();
        let team = team.map(|team| format!("x-team={team} ")).unwrap_or_default();
        format!("{who}ip {ip} port {port} host {host} {team}{method} {path}")
    }

    fn attribute(&self, of: Attribute) -> Option<String> {
        match of {
            Principal => self.who.map(|(ns, account)| format!("cluster.local/ns/{ns}/sa/{account}")),
            Namespace => self.who.map(|(namespace, _)| namespace.to_owned()),
            Ip => Some(self.ip.to_owned()),
            Verb => Some(self.method.to_owned()),
            Path => Some(self.path.to_owned()),
            Port => Some(self.port.to_owned()),
            Host => Some(self.host.to_owned()),
            Team => self.team.map(str::to_owned),
        }
    }
}

/// What a word means for a value, by nothing but the word.
fn means(word: &str, value: &str) -> bool {
    match word {
        "10.1.0.0/16" => value.starts_with("10.1."),
        "0.0.0.0/0" => true,
        "/{**}" => value.starts_with('/'),
        "/{*}/b" => {
            let segments: Vec<&str> = value.split('/').collect();
            segments.len() == 3 && !segments[1].is_empty() && segments[2] == "b"
        }
        word => match word.split_once('*') {
            None => word == value,
            Some(("", "")) => !value.is_empty(),
            Some((start, "")) => value.starts_with(start),
            Some((_, end)) => value.ends_with(end),
        },
    }
}

fn holds(asks: &Asks, request: &Request) -> bool {
    let value = request.attribute(asks.of);
    let is = |word: &&str| value.as_deref().is_some_and(|value| means(word, value));
    (asks.one_of.is_empty() || asks.one_of.iter().any(is)) && !asks.none_of.iter().any(is)
}

fn rule_holds(rule: &WrittenRule, request: &Request) -> bool {
    let one_of = |parts: &[Vec<Asks>]| {
        parts.is_empty() || parts.iter().any(|part| part.iter().all(|asks| holds(asks, request)))
    };
    one_of(&rule.from) && one_of(&rule.to) && rule.when.iter().all(|asks| holds(asks, request))
}

fn expected(policies: &[Written], request: &Request) -> String {
    let first = |policy: &Written| policy.rules.iter().position(|rule| rule_holds(rule, request));
    for (i, policy) in policies.iter().enumerate().filter(|(_, policy)| policy.deny) {
        if let Some(rule) = first(policy) {
            return format!("denied p{i}/{rule}");
        }
    }
    let mut allow = policies.iter().filter(|policy| !policy.deny).peekable();
    let allowed = allow.peek().is_none() || allow.any(|policy| first(policy).is_some());
    if allowed { "allowed" } else { "denied none" }.to_owned()
}

fn written(asks: &[Asks]) -> Map<String, Value> {
    let mut fields = Map::new();
    for Asks { of, one_of, none_of } in asks {
        let (field, not) = of.fields();
        for (name, words) in [(field, one_of), (not, none_of)] {
            if !words.is_empty() {
                fields.insert(name.to_owned(), json!(words));
            }
        }
    }
    fields
}

impl WrittenRule {
    fn json(&self) -> Value {
        let mut rule = Map::new();
        let list = |parts: &[Vec<Asks>], name: &str| {
            parts.iter().map(|part| json!({ name: written(part) })).collect::<Value>()
        };
        if !self.from.is_empty() {
            rule.insert("from".into(), list(&self.from, "source"));
        }
        if !self.to.is_empty() {
            rule.insert("to".into(), list(&self.to, "operation"));
        }
        let when = self.when.iter().map(|asks| {
            let mut condition = written(std::slice::from_ref(asks));
            condition.insert("key".into(), json!("request.headers[x-team]"));
            Value::Object(condition)
        });
        rule.insert("when".into(), when.collect());
        Value::Object(rule)
    }
}

impl Written {
    fn line(&self) -> String {
        let rules: Vec<_> = self.rules.iter().map(|rule| rule.json().to_string()).collect();
        format!("{} {}", if self.deny { "DENY" } else { "ALLOW" }, rules.join(", "))
    }
}

fn said_of(policies: &[Written], request: &Request) -> String {
    let lines: Vec<_> = policies.iter().map(Written::line).collect();
    let snapshot = compiled(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    Question::read(&request.text()).ask(&snapshot)
}

proptest! {
    #[test]
    fn policies_say_what_they_are_written_to_say(policies in policies(), requests in vec(request(), 1..8)) {
        for request in requests {
            prop_assert_eq!(said_of(&policies, &request), expected(&policies, &request), "{:?}", request);
        }
    }

    /// Whoever is refused stays so whatever else is denied, and whoever is let in whatever else is allowed beside.
    #[test]
    fn more_denied_lets_nobody_in_and_more_allowed_keeps_nobody_out(
        policies in policies(),
        rule in rule(),
        request in request(),
    ) {
        let before = said_of(&policies, &request) == "allowed";
        let with = |deny| {
            let more = Written { deny, rules: vec![rule.clone()] };
            said_of(&[&policies[..], &[more]].concat(), &request) == "allowed"
        };
        prop_assert!(before || !with(true), "{:?}", request);
        if policies.iter().any(|policy| !policy.deny) {
            prop_assert!(!before || with(false), "{:?}", request);
        }
    }

    /// The order of policies, and of rules in one, is nothing but whom a refusal names.
    #[test]
    fn the_order_of_policies_and_rules_decides_nothing(
        (policies, shuffled) in policies().prop_flat_map(|policies| (Just(policies.clone()), Just(policies).prop_shuffle())),
        request in request(),
    ) {
        let turned: Vec<Written> = shuffled.into_iter().map(|policy| {
            Written { rules: policy.rules.into_iter().rev().collect(), ..policy }
        }).collect();
        let allowed = |policies: &[Written]| said_of(policies, &request) == "allowed";
        prop_assert_eq!(allowed(&policies), allowed(&turned), "{:?}", request);
    }
}
