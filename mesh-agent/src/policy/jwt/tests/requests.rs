//! Where tokens are looked for, and what the app gets of the request.

use super::*;

/// A token of this subject.
fn of(subject: &str) -> String {
    token(&with("sub", json!(subject)))
}

fn request(target: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::get(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// Rules, target, headers; what comes of it, and what is left (up to `…`).
type Case<'a> = (&'a [Value], String, Vec<(&'a str, String)>, &'a str, &'a str);

/// What comes of a request: the subject (`-`: no token; else the failure), and what is left of it.
fn settled(rules: &[Value], mut request: Request<()>) -> (String, String) {
    let snapshot = compiled(rules, "");
    let said = match settle(tokens(&snapshot), 80, &mut request, NOW) {
        Ok(Some(claims)) => claims.principal().map_or("nobody", |[_, _, subject]| subject).to_owned(),
        Ok(None) => "-".to_owned(),
        Err(error) => format!("{:?}", error.kind),
    };
    let mut left = vec![request.uri().to_string()];
    let lines = request
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())));
    left.extend(lines);
    (said, left.join(" | "))
}

#[test]
fn tokens_are_found_where_rules_say_and_taken_out() {
    let default = [json!({"issuer": "https://issuer"})];
    let places = [json!({
        "issuer": "https://issuer",
        "fromHeaders": [{"name": "x-token"}, {"name": "x-other", "prefix": "token="}],
        "fromParams": ["t"],
        "fromCookies": ["session"],
    })];
    let a = of("a");
    let bearer = format!("Bearer {a}");
    let refused = |failure: TokenFailure| format!("{:?}", Kind::Token(failure));
    let (form, signature) = (refused(TokenFailure::Form), refused(TokenFailure::Signature));
    let not_base64 = refused(TokenFailure::HeaderBase64);
    let forged = OTHER.token(&json!({"alg": "EdDSA"}), &claims());
    let header = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    let table: Vec<Case<'_>> = vec![
        // The places where a rule looks that names none.
        (&default, "/".into(), vec![], "-", "/"),
        (&default, "/".into(), header("authorization", &bearer), "a", "/"),
        (&default, "/".into(), header("authorization", &format!("bearer {a}")), "a", "/"),
        (&default, "/".into(), header("authorization", &format!("BEARER   {a} ")), "a", "/"),
        (&default, "/".into(), header("authorization", "Basic YTpi"), "-", "/ | authorization: Basic YTpi"),
        (&default, "/".into(), header("authorization", "Bearers x"), "-", "/ | authorization: Bearers x"),
        (&default, "/".into(), header("authorization", "Bearer"), &form, "/ | authorization: Bearer"),
        (&default, "/".into(), header("authorization", "Bearer "), &form, "/ | authorization: Bearer "),
        (&default, "/".into(), header("authorization", &a), "-", "/ | authorization: …"),
        (&default, "/".into(), header("proxy-authorization", &bearer), "-", "/ | proxy-authorization: …"),
        (&default, format!("/x?access_token={a}"), vec![], "a", "/x"),
        (&default, format!("/x?a=1&access_token={a}&b=2"), vec![], "a", "/x?a=1&b=2"),
        (&default, format!("/x?access%5Ftoken={a}"), vec![], "a", "/x"),
        (&default, format!("/x?access_token={}", a.replace('.', "%2E")), vec![], "a", "/x"),
        (&default, "/x?access_token=".into(), vec![], &form, "/x?access_token="),
        (&default, "/x?access_token".into(), vec![], &form, "/x?access_token"),
        (&default, format!("/x?ACCESS_TOKEN={a}"), vec![], "-", "/x?ACCESS_TOKEN=…"),
        (&default, format!("/x?token={a}"), vec![], "-", "/x?token=…"),
        // Two of them: both have to be good.
        (&default, format!("/x?access_token={a}"), header("authorization", &bearer), "a", "/x"),
        (&default, format!("/x?access_token={}", of("b")), header("authorization", &bearer), "a", "/x"),
        (&default, format!("/x?access_token={forged}"), header("authorization", &bearer), &signature, "…"),
        (&default, format!("/x?access_token={a}&access_token={forged}"), vec![], &signature, "…"),
        (
            &default,
            "/".into(),
            [header("authorization", &bearer), header("authorization", &format!("Bearer {forged}"))].concat(),
            &signature,
            "…",
        ),
        (
            &default,
            "/".into(),
            [header("authorization", "Basic YTpi"), header("authorization", &format!("Bearer {forged}"))]
                .concat(),
            &signature,
            "…",
        ),
        // The places of a rule that names some, and no others.
        (&places, "/".into(), header("authorization", &bearer), "-", "/ | authorization: …"),
        (&places, format!("/?access_token={a}"), vec![], "-", "/?access_token=…"),
        (&places, "/".into(), header("x-token", &a), "a", "/"),
        (&places, "/".into(), header("x-token", &format!(" {a} ")), "a", "/"),
        (&places, "/".into(), header("x-token", &bearer), &not_base64, "…"),
        (&places, "/".into(), header("x-token", ""), &form, "…"),
        (&places, "/".into(), header("x-other", &a), "-", "/ | x-other: …"),
        (&places, "/".into(), header("x-other", &format!("token={a}")), "a", "/"),
        (&places, "/".into(), header("x-other", &format!("kind=jwt; token= {a}; more")), "a", "/"),
        (&places, "/".into(), header("x-other", "token="), &form, "…"),
        (&places, format!("/?t={a}&u=1"), vec![], "a", "/?u=1"),
        (&places, "/".into(), header("cookie", &format!("session={a}")), "a", "/"),
        (
            &places,
            "/".into(),
            header("cookie", &format!("a=b; session=\"{a}\"; c=d")),
            "a",
            "/ | cookie: a=b; c=d",
        ),
        (&places, "/".into(), header("cookie", &format!("xsession={a}; session2={a}")), "-", "/ | cookie: …"),
        (
            &places,
            "/".into(),
            [header("cookie", "a=b"), header("cookie", &format!("session={forged}"))].concat(),
            &signature,
            "…",
        ),
    ];
    assert!(table.len() >= 35);
    for (rules, target, headers, expected, left) in table {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, &**value)).collect();
        let (said, remains) = settled(rules, request(&target, &headers));
        assert_eq!(said, expected, "{target} {headers:?}");
        let (start, ends) = left.split_once('…').map_or((left, false), |(start, _)| (start, true));
        let as_expected = if ends { remains.starts_with(start) } else { remains == left };
        assert!(as_expected, "{target} {headers:?}: {remains}, not {left}");
    }
}

#[test]
fn the_original_is_forwarded_where_a_rule_says_so() {
    let rules = [json!({"issuer": "https://issuer", "forwardOriginalToken": true})];
    let a = of("a");
    let bearer = format!("Bearer {a}");
    let target = format!("/x?access_token={a}");
    let (said, left) = settled(&rules, request(&target, &[("authorization", &bearer)]));
    assert_eq!((&*said, left), ("a", format!("{target} | authorization: {bearer}")));
}

#[test]
fn more_tokens_than_anybody_needs_are_refused() {
    let rules = [json!({"issuer": "https://issuer", "fromHeaders": [{"name": "x-token"}]})];
    let a = of("a");
    for (count, expected) in [(1, "a"), (4, "a"), (5, "Token(TooMany)"), (50, "Token(TooMany)")] {
        let headers = vec![("x-token", &*a); count];
        assert_eq!(settled(&rules, request("/", &headers)).0, expected, "{count}");
    }
}

#[test]
fn claims_become_headers_and_nobody_else_can_write_those() {
    let rules = [json!({
        "issuer": "https://issuer",
        "outputPayloadToHeader": "x-payload",
        "outputClaimToHeaders": [
            {"header": "x-sub", "claim": "sub"},
            {"header": "x-level", "claim": "level"},
            {"header": "x-admin", "claim": "admin"},
            {"header": "x-team", "claim": "org.team"},
            {"header": "x-groups", "claim": "groups"},
        ],
    })];
    let payload = json!({
        "iss": "https://issuer", "sub": "grüße", "level": -7, "admin": true, "org": {"team": "red"},
        "groups": ["a", "b"],
    });
    let text = token(&payload);
    let forged = [
        ("x-sub", "root"),
        ("X-Admin", "true"),
        ("x-admin", "yes"),
        ("x-groups", "all"),
        ("x-payload", "e30"),
    ];
    let (said, left) = settled(&rules, request("/", &forged));
    assert_eq!((&*said, &*left), ("-", "/"), "what the client made up is gone, with a token or without");
    let mut headers = forged.to_vec();
    let bearer = format!("Bearer {text}");
    headers.push(("authorization", &bearer));
    let (said, left) = settled(&rules, request("/", &headers));
    let payload_header = text.split('.').nth(1).unwrap();
    let expected = [
        "/",
        &format!("x-payload: {payload_header}"),
        "x-sub: grüße",
        "x-level: -7",
        "x-admin: true",
        "x-team: red",
    ];
    let mut lines: Vec<&str> = left.split(" | ").collect();
    lines[1..].sort_unstable();
    let mut expected = expected.to_vec();
    expected[1..].sort_unstable();
    assert_eq!((&*said, lines), ("grüße", expected), "lists are no headers");
    for (claim, value) in [
        ("sub", json!("two\nlines")),
        ("sub", json!("")),
        ("level", json!(1.5)),
        ("level", Value::Null),
        ("admin", json!({})),
        ("org", json!("red")),
        ("org", json!({"team": {"name": "red"}})),
    ] {
        let mut payload = json!({"iss": "https://issuer"});
        payload[claim] = value.clone();
        let bearer = format!("Bearer {}", token(&payload));
        let (_, left) = settled(&rules, request("/", &[("authorization", &bearer)]));
        assert!(
            left.starts_with("/ | x-payload: ") && left.matches(" | ").count() == 1,
            "{claim} {value}: {left}"
        );
    }
}

#[test]
fn rules_of_several_issuers_hold_together() {
    let rules = [
        json!({"issuer": "https://issuer", "audiences": ["one"], "outputClaimToHeaders": [{"header": "x-one", "claim": "sub"}]}),
        json!({"issuer": "https://issuer", "audiences": ["two"], "forwardOriginalToken": true}),
        json!({"issuer": "https://second", "fromHeaders": [{"name": "Authorization", "prefix": "Bearer "}, {"name": "x-second"}]}),
    ];
    let payload = |issuer: &str, audience: &str| json!({"iss": issuer, "sub": "a", "aud": audience});
    for (issuer, audience, expected, left) in [
        ("https://issuer", "one", "a", "/ | x-one: a"),
        ("https://issuer", "two", "a", "/ | authorization: …"),
        ("https://issuer", "three", "Token(Audience)", "/ | authorization: …"),
        ("https://second", "three", "a", "/"),
        ("https://third", "one", "Token(Issuer)", "/ | authorization: …"),
    ] {
        let bearer = format!("Bearer {}", token(&payload(issuer, audience)));
        let (said, remains) = settled(&rules, request("/", &[("authorization", &bearer)]));
        assert_eq!(said, expected, "{issuer} {audience}");
        let (start, _) = left.split_once('…').unwrap_or((left, ""));
        assert!(remains.starts_with(start), "{issuer} {audience}: {remains}");
    }
    // The place of one issuer is not another's.
    let second = token(&payload("https://issuer", "one"));
    assert_eq!(settled(&rules, request("/", &[("x-second", &second)])).0, "Token(Issuer)");
}

#[test]
fn keys_that_are_not_there_yet_refuse() {
    let uri = "https://issuer/keys";
    let snapshot = compiled(&[json!({"issuer": "https://issuer", "jwksUri": uri})], "");
    let settle = |text: &str| super::settle(tokens(&snapshot), 80, &mut bearer(text), NOW);
    let good = token(&claims());
    let refused = settle(&good).unwrap_err();
    assert_eq!(refused.kind, Kind::Token(TokenFailure::NoKeys));
    assert!(refused.detail.ends_with(&format!("the key set of {uri} has not been fetched yet")), "{refused}");
    let cell = &snapshot.key_sets[uri];
    cell.set(KeySet::parse(&OTHER.jwks()).unwrap().into());
    assert_eq!(why(settle(&good)), Some(TokenFailure::Signature));
    cell.set(KeySet::parse(&SIGNER.jwks()).unwrap().into());
    assert_eq!(why(settle(&good)), None);
}
