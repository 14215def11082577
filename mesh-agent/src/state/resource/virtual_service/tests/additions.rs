//! Mirrors, CORS, delegates, faults by header, and names.

use super::*;
use crate::state::snapshot::{StringMatch, UnmatchedPreflights};

#[test]
fn bad_mirrors() {
    let mirror = json!({"host": "a"});
    refused(vec![
        (rule(json!({"mirror": {}})), "http[0].mirror", "missing field `host`"),
        (rule(json!({"mirror": {"host": "*.a"}})), "http[0].mirror.host", "wildcard"),
        (
            rule(json!({"mirror": mirror, "mirrorPercentage": {"value": 101}})),
            "http[0].mirrorPercentage.value",
            "0..100",
        ),
        (rule(json!({"mirror": mirror, "mirrorPercent": 101})), "http[0].mirrorPercent", "it has 101"),
        (rule(json!({"mirror": mirror, "mirrorPercent": -1})), "http[0].mirrorPercent", "invalid value"),
        (rule(json!({"mirrors": [{}]})), "http[0].mirrors[0].destination", "is required"),
        (
            rule(json!({"mirrors": [{"destination": mirror}, {"destination": {"host": "a b"}}]})),
            "http[0].mirrors[1].destination.host",
            "not a domain name",
        ),
        (
            rule(json!({"mirrors": [{"destination": mirror, "percentage": {"value": -0.5}}]})),
            "http[0].mirrors[0].percentage.value",
            "0..100",
        ),
        (
            rule(json!({"mirror": mirror, "mirrors": [{"destination": mirror}]})),
            "http[0].mirrors",
            "both mirror and mirrors",
        ),
    ]);
}

#[test]
fn good_mirrors() {
    let shares = |fields: Value| -> Vec<(String, u32)> {
        let mirrors = good(fields).mirrors.unwrap_or_default();
        mirrors.into_iter().map(|mirror| (mirror.field, mirror.percentage.0)).collect()
    };
    let one = |share| vec![("mirror".to_owned(), share)];
    let mirror = json!({"host": "a", "port": {"number": 80}, "subset": "v1"});
    assert_eq!(shares(json!({"mirror": mirror})), one(1_000_000), "everything, where nothing is said");
    assert_eq!(shares(json!({"mirror": mirror, "mirrorPercentage": {"value": 12.5}})), one(125_000));
    assert_eq!(shares(json!({"mirror": mirror, "mirrorPercent": 30})), one(300_000));
    assert_eq!(
        shares(json!({"mirror": mirror, "mirrorPercent": 30, "mirrorPercentage": {"value": 40}})),
        one(400_000)
    );
    assert_eq!(shares(json!({"mirror": mirror, "mirrorPercentage": {"value": 0}})), []);
    assert_eq!(shares(json!({"mirror": mirror, "mirrorPercentage": {}})), []);
    assert_eq!(shares(json!({"mirror": mirror, "mirrorPercent": 0})), []);
    let several = json!({"mirrors": [
        {"destination": mirror}, {"destination": mirror, "percentage": {"value": 0}},
        {"destination": mirror, "percentage": {"value": 0.1}},
    ]});
    let expected =
        [("mirrors[0].destination".to_owned(), 1_000_000), ("mirrors[2].destination".to_owned(), 1_000)];
    assert_eq!(shares(several), expected);
    assert!(good(json!({"mirrors": []})).mirrors.is_none());
}

#[test]
fn bad_cors() {
    let cors = |policy: Value| rule(json!({"corsPolicy": policy}));
    refused(vec![
        (cors(json!({"allowOrigins": [{}]})), "http[0].corsPolicy.allowOrigins[0]", "one of exact"),
        (
            cors(json!({"allowOrigins": [{"exact": "a"}, {"regex": "("}]})),
            "http[0].corsPolicy.allowOrigins[1].regex",
            "not a regular expression",
        ),
        (
            cors(json!({"allowMethods": ["GET", "FETCH"]})),
            "http[0].corsPolicy.allowMethods[1]",
            "\"FETCH\" is not a supported HTTP method",
        ),
        (cors(json!({"allowHeaders": ["a b"]})), "http[0].corsPolicy.allowHeaders[0]", "header name"),
        (cors(json!({"exposeHeaders": ["a", ""]})), "http[0].corsPolicy.exposeHeaders[1]", "header name"),
        (cors(json!({"maxAge": "1.5s"})), "http[0].corsPolicy.maxAge", "seconds precision"),
        (cors(json!({"maxAge": "0s"})), "http[0].corsPolicy.maxAge", "1ms"),
        (
            cors(json!({"unmatchedPreflights": "DROP"})),
            "http[0].corsPolicy.unmatchedPreflights",
            "unknown variant",
        ),
        (cors(json!({"allowCredentials": "yes"})), "http[0].corsPolicy.allowCredentials", "invalid type"),
    ]);
}

#[test]
fn good_cors() {
    let read = |policy: Value| good(json!({"corsPolicy": policy})).cors.unwrap();
    let full = read(json!({
        "allowOrigins": [{"exact": "https://a"}, {"prefix": "https://b."}, {"regex": "c|d"}],
        "allowMethods": ["GET", "POST"], "allowHeaders": ["x-a", "X-B"], "exposeHeaders": ["x-c"],
        "maxAge": "24h", "allowCredentials": true, "unmatchedPreflights": "IGNORE",
    }));
    assert_eq!(full.allow_origins.len(), 3);
    let values = [&full.allow_methods, &full.allow_headers, &full.expose_headers, &full.max_age];
    let values = values.map(|value| value.as_ref().unwrap().to_str().unwrap());
    assert_eq!(values, ["GET,POST", "x-a,X-B", "x-c", "86400"]);
    assert!(full.allow_credentials && full.unmatched_preflights == UnmatchedPreflights::Ignore);
    let older = read(json!({"allowOrigin": ["https://a", "*"]}));
    assert!(older.allow_origins.iter().all(|origin| matches!(origin, StringMatch::Exact(_))));
    let both = read(json!({"allowOrigin": ["x"], "allowOrigins": [{"prefix": "y"}]}));
    assert!(matches!(&both.allow_origins[..], [StringMatch::Prefix(prefix)] if prefix == "y"));
    let empty = read(json!({"unmatchedPreflights": "UNSPECIFIED"}));
    assert!(empty.allow_origins.is_empty() && empty.allow_methods.is_none() && !empty.allow_credentials);
    assert_eq!(empty.unmatched_preflights, UnmatchedPreflights::Forward);
}

#[test]
fn bad_delegates() {
    let root = |fields: Value| {
        let mut rule = json!({"delegate": {"name": "x"}, "name": "r"});
        for (name, value) in fields.as_object().unwrap() {
            rule[name] = value.clone();
        }
        json!({"hosts": ["reviews"], "http": [rule]})
    };
    let http = json!([{"route": [{"destination": {"host": "a"}}]}]);
    refused(vec![
        (root(json!({"delegate": {}})), "http[0].delegate", "missing field `name`"),
        (root(json!({"delegate": {"name": ""}})), "http[0].delegate.name", "is required"),
        (root(json!({"delegate": {"name": "X"}})), "http[0].delegate.name", "not a name"),
        (
            root(json!({"delegate": {"name": "x", "namespace": "a/b"}})),
            "http[0].delegate.namespace",
            "not a name",
        ),
        (
            root(json!({"route": [{"destination": {"host": "a"}}]})),
            "http[0].route",
            "root HTTP route r must not specify route",
        ),
        (root(json!({"redirect": {"uri": "/"}})), "http[0].redirect", "must not specify redirect"),
        (
            root(json!({"directResponse": {"status": 200}})),
            "http[0].directResponse",
            "must not specify directResponse",
        ),
        (
            json!({"http": [{"delegate": {"name": "x"}}]}),
            "http[0].delegate",
            "delegate HTTP route cannot contain delegate",
        ),
        (json!({"gateways": ["mesh"], "http": http}), "gateways", "must have no gateways"),
        (json!({"http": http, "tls": [{}]}), "tls", "must have no tls route"),
        (json!({"http": http, "tcp": [{}]}), "tcp", "must have no tcp route"),
        (json!({}), "http", "http, tcp or tls must be provided"),
    ]);
}

#[test]
fn good_delegates() {
    let delegate = |written: Value| {
        let spec = json!({"hosts": ["a"], "http": [{"delegate": written, "timeout": "2s"}]});
        let RuleAction::Delegate { namespace, name } = read(&spec).unwrap().http.remove(0).action else {
            panic!("a delegate")
        };
        format!("{namespace}/{name}")
    };
    assert_eq!(delegate(json!({"name": "x"})), "default/x");
    assert_eq!(delegate(json!({"name": "x", "namespace": "shop"})), "shop/x");
}

#[test]
fn faults_by_header_are_switched_on_by_annotation() {
    let spec = rule(json!({}));
    let on = |value: &str| {
        let annotations = BTreeMap::from([("mesh.io/fault-by-header".to_owned(), value.to_owned())]);
        let key = ObjectKey::new("VirtualService", "default", "reviews");
        check(&key, None, &annotations, &spec).unwrap().fault_by_header
    };
    assert!(on("true") && !on("false") && !on("") && !on("True"));
    assert!(!read(&spec).unwrap().fault_by_header);
}

#[test]
fn names_of_matches() {
    let m = json!([{"name": "one", "statPrefix": "s"}, {"name": "", "statPrefix": ""}]);
    let matches = good(json!({"match": m})).matches;
    assert_eq!(
        (matches[0].request.name.as_deref(), matches[0].request.stat_prefix.as_deref()),
        (Some("one"), Some("s"))
    );
    assert!(matches[1].request.name.is_none() && matches[1].request.stat_prefix.is_none());
}

#[test]
fn who_sees_it() {
    let mut spec = rule(json!({}));
    assert_eq!(read(&spec).unwrap().visible, Visibility::Everywhere);
    spec["exportTo"] = json!([".", "shop"]);
    let visible = read(&spec).unwrap().visible;
    assert!(visible.to("default") && visible.to("shop") && !visible.to("other"));
}
