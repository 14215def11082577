//! `meshctl validate` as users type it.

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n";
const SUBSET: &str = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\n\
                      spec: {hosts: [a], http: [{route: [{destination: {host: a, subset: v9}}]}]}\n";

fn directory(files: &[(&str, &str)]) -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    for (name, text) in files {
        fs::write(dir.path().join(name), text)?;
    }
    Ok(dir)
}

/// What is written, and the exit code.
async fn validated(arguments: &[&str]) -> Result<(String, u8)> {
    let mut out = Vec::new();
    let cli = Cli::try_parse_from(["meshctl", "validate"].iter().chain(arguments))?;
    let ended = run(cli, &mut out).await;
    Ok((String::from_utf8(out)?, ended.map_or_else(|failure| failure.code(), |()| 0)))
}

#[tokio::test]
async fn good_manifests_end_with_0_and_what_is_wrong_between_them_with_1() -> Result<()> {
    let dir = directory(&[("a.yaml", SERVICE), ("v.yaml", SUBSET), ("notes.txt", "{")])?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (service, rule) = (path("a.yaml"), path("v.yaml"));
    let (text, code) = validated(&[&service]).await?;
    assert_eq!((text.as_str(), code), ("nothing is wrong with 1 objects in 1 files\n", 0));
    assert_eq!(validated(&[&rule]).await?.1, 0, "alone it may be right");
    for paths in [vec![service.as_str(), &rule], vec![&path("")], vec![&path(""), &rule, &path("./v.yaml")]] {
        let (text, code) = validated(&paths).await?;
        assert_eq!(code, 1, "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("FILE") && lines[0].contains("OBJECT"), "{text}");
        let words = [
            "v.yaml",
            "VirtualService default/v",
            "destination.subset",
            "ReferenceNotFound",
            "subset \"v9\"",
        ];
        assert!(words.iter().all(|word| lines[1].contains(word)), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn problems_have_a_form_for_programs() -> Result<()> {
    let dir = directory(&[(
        "p.json",
        r#"{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "p", "namespace": "n"}, "spec": {"mtls": {"mode": "SOMETIMES"}}}"#,
    )])?;
    let path = dir.path().display().to_string();
    let (text, code) = validated(&[&path, "-o", "json"]).await?;
    let report: Value = serde_json::from_str(&text)?;
    assert_eq!((code, &report["objects"], &report["files"]), (1, &json!(0), &json!(1)));
    let problem = &report["problems"][0];
    assert_eq!(problem["object"], "PeerAuthentication n/p");
    assert_eq!(problem["field"], "spec.mtls.mode");
    assert_eq!(problem["cause"], "Invalid");
    assert!(problem["file"].as_str().is_some_and(|file| file.ends_with("p.json")), "{problem}");
    let yaml = validated(&[&path, "-o", "yaml"]).await?.0;
    assert!(yaml.contains("object: PeerAuthentication n/p\n"), "{yaml}");
    Ok(())
}

#[tokio::test]
async fn the_samples_are_good() -> Result<()> {
    let sample =
        |name: &str| format!("{}/../deploy/samples/bookinfo/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    let [services, rules, routes] = ["bookinfo", "destination-rules", "virtual-service-jason"].map(sample);
    let (text, code) = validated(&[&services, &rules, &routes]).await?;
    assert_eq!(code, 0, "{text}");
    let (text, code) = validated(&[&services, &routes]).await?;
    assert_eq!(code, 1, "{text}");
    assert!(
        text.lines().skip(1).all(|line| line.contains("no DestinationRule defines the subset")),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_wrong_usage() -> Result<()> {
    let (text, code) = validated(&["/nowhere/at/all.yaml"]).await?;
    assert_eq!((text.as_str(), code), ("", 2));
    let nothing = Cli::try_parse_from(["meshctl", "validate"]).err().map(|error| error.exit_code());
    assert_eq!(nothing, Some(2));
    Ok(())
}
