//! Whatever a client sends, nothing panics, and nothing is believed that was not signed.

use proptest::prelude::*;

use super::*;

/// The characters of tokens, and some of others.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[A-Za-z0-9_.=%-]{0,80}",
        "\\PC{0,40}",
        "(e30|eyJhbGciOiJFZERTQSJ9|[A-Za-z0-9_-]{1,9}|)(\\.(e30|[A-Za-z0-9_-]{0,9})){0,4}"
    ]
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z:/]{0,8}".prop_map(Value::from),
        Just(json!("https://issuer")),
        Just(json!("EdDSA")),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let names =
            prop_oneof!["[a-z]{1,4}", Just("alg".to_owned()), Just("exp".to_owned()), Just("iss".to_owned())];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

static RULES: LazyLock<Snapshot> = LazyLock::new(|| {
    compiled(
        &[json!({
            "issuer": "https://issuer",
            "fromHeaders": [{"name": "authorization", "prefix": "Bearer "}, {"name": "x-token", "prefix": "t "}],
            "fromParams": ["t"],
            "fromCookies": ["c"],
            "outputPayloadToHeader": "x-payload",
            "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}],
        })],
        "",
    )
});

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_nobody_signed_is_never_believed(text in text(), place in 0..4_usize) {
        let headers = [("authorization", "Bearer "), ("x-token", "t "), ("cookie", "a=b; c=")];
        let mut request = Request::builder();
        if let Some((name, before)) = headers.get(place) {
            let Ok(value) = HeaderValue::from_str(&format!("{before}{text}")) else { return Ok(()) };
            request = request.header(*name, value);
        } else {
            request = request.uri(format!("/?t={text}"));
        }
        let Ok(mut request) = request.body(()) else { return Ok(()) };
        let settled = settle(tokens(&RULES), 80, &mut request, NOW);
        prop_assert!(!matches!(settled, Ok(Some(_))), "{:?}", text);
    }

    #[test]
    fn any_header_and_payload_is_read_without_panic(header in json_value(), payload in json_value()) {
        let unsigned = format!("{}.{}.AAAA", base64(header.to_string()), base64(payload.to_string()));
        prop_assert!(failure(&unsigned).is_some());
        // Signed, it is believed only if the issuer is right, and then it can be asked anything.
        let mut request = bearer(&token(&payload));
        if let Ok(Some(claims)) = settle(tokens(&RULES), 80, &mut request, NOW) {
            prop_assert_eq!(payload["iss"].as_str(), Some("https://issuer"));
            let path: Box<[Box<str>]> = ["sub".into(), "a".into()].into();
            let _ = (claims.principal(), claims.presenter(), claims.audiences().count(), claims.any(&path, |_| true));
            prop_assert!(!request.headers().contains_key("authorization"));
        }
    }

    #[test]
    fn a_token_with_one_character_changed_is_another(at in any::<prop::sample::Index>(), to in "[A-Za-z0-9_.-]") {
        let good = token(&claims());
        let at = at.index(good.len());
        let mut changed = good.clone();
        changed.replace_range(at..=at, &to);
        prop_assert_eq!(failure(&changed).is_none(), changed == good);
    }
}
