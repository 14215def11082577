//! Our entry in a list of chained plugins (CNI specification 1.1.0, section 1: `plugins` of a network configuration list).
//!
//! Pure: from one list to the next. Never changes anything but our own entry. Tested below.

use serde_json::{Value, json};

use super::PLUGIN;

/// Why our entry cannot be put there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoChain {
    /// No network is made here.
    #[error("it has no plugins")]
    Empty,
    /// `plugins` or what is in it is of another shape.
    #[error("it is no network configuration: {0}")]
    Shape(&'static str),
}

/// The list with our entry at its end, where every pod has its network; `None`: it is there.
pub(super) fn with(list: &Value, entry: &Value) -> Result<Option<Value>, NoChain> {
    let plugins = plugins(list)?;
    if plugins.iter().all(is_ours) {
        return Err(NoChain::Empty);
    }
    let is_last = plugins.last() == Some(entry);
    if is_last && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(None);
    }
    let mut chained: Vec<Value> = plugins.iter().filter(|plugin| !is_ours(plugin)).cloned().collect();
    chained.push(entry.clone());
    Ok(Some(with_plugins(list, chained)))
}

/// The list without our entry; `None`: it has none.
pub(super) fn without(list: &Value) -> Option<Value> {
    let plugins = plugins(list).ok()?;
    let others: Vec<Value> = plugins.iter().filter(|plugin| !is_ours(plugin)).cloned().collect();
    (others.len() < plugins.len()).then(|| with_plugins(list, others))
}

/// A list of its own for a configuration of a single plugin, which has no place for a second one.
pub(super) fn of_single(conf: &Value, entry: &Value) -> Result<Value, NoChain> {
    let name = conf.get("name").and_then(Value::as_str).ok_or(NoChain::Shape("`name` is missing"))?;
    conf.get("type").and_then(Value::as_str).ok_or(NoChain::Shape("`type` is missing"))?;
    let version = conf.get("cniVersion").and_then(Value::as_str).unwrap_or("0.3.1");
    let mut first = conf.clone();
    if let Some(fields) = first.as_object_mut() {
        fields.retain(|field, _| field != "name" && field != "cniVersion");
    }
    Ok(json!({"cniVersion": version, "name": name, "plugins": [first, entry]}))
}

fn plugins(list: &Value) -> Result<&Vec<Value>, NoChain> {
    let plugins = list.get("plugins").ok_or(NoChain::Shape("`plugins` is missing"))?;
    plugins.as_array().ok_or(NoChain::Shape("`plugins` is no list"))
}

fn with_plugins(list: &Value, plugins: Vec<Value>) -> Value {
    let mut list = list.clone();
    list["plugins"] = Value::Array(plugins);
    list
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn list(plugins: &[Value]) -> Value {
        json!({"cniVersion": "1.0.0", "name": "net", "plugins": plugins, "extra": [1]})
    }

    fn ours(socket: &str) -> Value {
        json!({"type": PLUGIN, "socket": socket})
    }

    #[test]
    fn our_entry_is_last_and_there_once() {
        let (ptp, portmap) = (json!({"type": "ptp", "ipMasq": true}), json!({"type": "portmap"}));
        let before = list(&[ptp.clone(), portmap.clone()]);
        let chained = with(&before, &ours("/a")).unwrap().unwrap();
        assert_eq!(chained, list(&[ptp.clone(), portmap.clone(), ours("/a")]));
        assert_eq!(with(&chained, &ours("/a")), Ok(None));
        assert_eq!(without(&chained), Some(before.clone()));
        assert_eq!(without(&before), None);

        // Another agent's way to its socket, and a tool that has put itself behind us.
        let moved = with(&chained, &ours("/b")).unwrap().unwrap();
        assert_eq!(moved, list(&[ptp.clone(), portmap.clone(), ours("/b")]));
        let behind = list(&[ptp.clone(), ours("/a"), portmap.clone()]);
        assert_eq!(with(&behind, &ours("/a")).unwrap(), Some(chained));
        let twice = list(&[ptp.clone(), ours("/a"), ours("/a")]);
        assert_eq!(with(&twice, &ours("/a")).unwrap(), Some(list(&[ptp, ours("/a")])));
    }

    #[test]
    fn what_makes_no_network_is_no_chain() {
        assert_eq!(with(&list(&[]), &ours("/a")), Err(NoChain::Empty));
        assert_eq!(with(&list(&[ours("/a")]), &ours("/a")), Err(NoChain::Empty));
        for wrong in [json!({}), json!({"plugins": 1}), json!([]), json!("x"), Value::Null] {
            assert!(matches!(with(&wrong, &ours("/a")), Err(NoChain::Shape(_))), "{wrong}");
            assert_eq!(without(&wrong), None);
        }
    }

    #[test]
    fn a_single_plugin_becomes_the_first_of_a_list() {
        let conf =
            json!({"cniVersion": "0.4.0", "name": "net", "type": "bridge", "ipam": {"type": "host-local"}});
        let chained = of_single(&conf, &ours("/a")).unwrap();
        assert_eq!(chained["cniVersion"], "0.4.0");
        assert_eq!(chained["name"], "net");
        let first = json!({"type": "bridge", "ipam": {"type": "host-local"}});
        assert_eq!(chained["plugins"], json!([first, ours("/a")]));
        assert!(of_single(&json!({"type": "bridge"}), &ours("/a")).is_err());
        assert!(of_single(&json!({"name": "net"}), &ours("/a")).is_err());
    }
}
