//! Files that are merged, kept and left alone; servers that answer and do not.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::ask::ask;
use super::clients::*;
use super::install::*;
use super::*;
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::Read;
use std::net::TcpListener;
use std::thread;
use toml_edit::DocumentMut;

const ALL: [Client; 4] = [Client::Claude, Client::Codex, Client::Opencode, Client::Pi];

fn setup() -> Setup {
    Setup { url: "http://127.0.0.1:8000".into(), model: "flash".into(), ctx: 100_000, key: None }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A server for one request: what it was asked, and what came of it.
fn asked(answer: &'static str, key: Option<&str>) -> (String, Result<u32>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut request, mut bytes) = (String::new(), [0; 1024]);
        while !request.ends_with("\r\n\r\n") {
            let n = stream.read(&mut bytes).unwrap();
            request += str::from_utf8(&bytes[..n]).unwrap();
        }
        stream.write_all(answer.as_bytes()).unwrap();
        request
    });
    let outcome = ask(&url, key);
    (server.join().unwrap(), outcome)
}

#[test]
fn addresses() {
    for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"] {
        assert_eq!(base(url).unwrap(), "http://a:1");
    }
    assert_eq!(base("https://a/ds4/v1").unwrap(), "https://a/ds4");
    for bad in ["", "a:1", "http://", "http://a b", "ftp://a", "http://a\r\nX: y", "http://a?b"] {
        assert!(base(bad).is_err(), "{bad}");
    }
}

#[test]
fn places() {
    let home = Path::new("/home/me");
    let at = |client| file(client, home, |_| None);
    assert_eq!(at(Client::Claude), Path::new("/home/me/.claude/settings.json"));
    assert_eq!(at(Client::Codex), Path::new("/home/me/.codex/config.toml"));
    assert_eq!(at(Client::Opencode), Path::new("/home/me/.config/opencode/opencode.json"));
    assert_eq!(at(Client::Pi), Path::new("/home/me/.pi/agent/models.json"));
    let folder = if cfg!(windows) { r"C:\x" } else { "/x" };
    let moved = |name: &str| (name == "XDG_CONFIG_HOME").then(|| folder.into());
    assert_eq!(file(Client::Opencode, home, moved), Path::new(folder).join("opencode/opencode.json"));
    assert_eq!(file(Client::Opencode, home, |_| Some("x".into())), at(Client::Opencode), "a relative one");
}

#[test]
fn other_settings_stay() {
    let old = "{\n\t\"theme\": \"dark\",\n\t\"env\": {\"A\": \"1\", \"ANTHROPIC_MODEL\": \"opus\"},\n\
               \t\"z\": [1.0]\n}";
    let text = merged(Client::Claude, old, &setup()).unwrap();
    assert!(text.starts_with("{\n\t\"theme\": \"dark\",\n\t\"env\": {\n\t\t\"A\": \"1\","), "{text}");
    let new = json(&text);
    assert_eq!(new["z"], json!([1.0]));
    assert_eq!(new["env"]["ANTHROPIC_MODEL"], "flash");
    assert_eq!(new["env"]["ANTHROPIC_BASE_URL"], "http://127.0.0.1:8000");
    assert_eq!(new["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], "100000");

    let old = r#"{"provider":{"other":{"npm":"x"},"local":{"models":{"old":{}}}},"model":"other/m"}"#;
    let new = json(&merged(Client::Opencode, old, &setup()).unwrap());
    assert_eq!((&new["model"], &new["small_model"]), (&json!("local/flash"), &json!("local/flash")));
    assert_eq!(new["provider"]["other"]["npm"], "x");
    let local = &new["provider"]["local"];
    assert_eq!((&local["models"]["old"], &local["options"]["apiKey"]), (&json!({}), &json!("local")));
    let limit = json!({"context": 100_000, "output": 32_000});
    assert_eq!(local["models"]["flash"]["limit"], limit);

    let new = json(&merged(Client::Pi, r#"{"providers":{"other":{}},"x":1}"#, &setup()).unwrap());
    assert_eq!((&new["providers"]["other"], &new["x"]), (&json!({}), &json!(1)));
    assert_eq!(new["providers"]["local"]["models"][0]["id"], "flash");
}

#[test]
fn codex_keeps_comments() {
    let old = "# mine\nmodel = \"gpt\" # favourite\n\n[tools]\nx = 1 # one\n\n# here\n[model_providers.local]\n\
               base_url = \"http://old\" # where\nquery_params = {}\n\n\
               [model_providers.local.http_headers]\na = \"b\"\n\n\
               [model_providers.other]\nname = \"o\"\n";
    let text = merged(Client::Codex, old, &setup()).unwrap();
    assert!(text.starts_with("# mine\nmodel = \"flash\" # favourite\n"), "{text}");
    for kept in [
        "[tools]\nx = 1 # one\n",
        "# here\n[model_providers.local]",
        "[model_providers.other]\nname = \"o\"\n",
    ] {
        assert!(text.contains(kept), "{text}");
    }
    assert!(text.contains("base_url = \"http://127.0.0.1:8000/v1\" # where"), "{text}");
    let doc: DocumentMut = text.parse().unwrap();
    let local = doc["model_providers"][PROVIDER].as_table_like().unwrap();
    let keys: Vec<&str> = local.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["base_url", "name", "wire_api", "stream_idle_timeout_ms"]);
    assert_eq!(doc["model_context_window"].as_integer(), Some(100_000));
}

#[test]
fn codex_shapes() {
    let olds = [
        "",
        "[a]\nb = 1\n[c]\n[a.d]\n",
        "# nothing but this",
        "[model_providers]\n[z]\n",
        "model_providers = { other = { name = \"o\" } }\n[z]\n",
        "model_providers = { local = { name = \"o\" } }\n",
        "model_providers.other.name = \"o\"\n[z]\n",
        "model_providers.local.name = \"o\"\nx = 1\n[[z]]\n",
    ];
    for old in olds {
        let text = merged(Client::Codex, old, &setup()).unwrap();
        let doc: DocumentMut = text.parse().unwrap();
        assert_eq!(doc["model_provider"].as_str(), Some("local"), "{text}");
        let local = &doc["model_providers"]["local"];
        assert_eq!(local["base_url"].as_str(), Some("http://127.0.0.1:8000/v1"), "{text}");
        assert_eq!(doc.contains_key("z"), old.contains('z'), "{text}");
        assert_eq!(merged(Client::Codex, &text, &setup()).unwrap(), text, "twice");
    }
    assert!(merged(Client::Codex, "model_providers = 1", &setup()).is_err());
    assert!(merged(Client::Codex, "[model_providers]\nlocal = 1", &setup()).is_err());
}

#[test]
fn keys_go_where_they_belong() {
    let with_key = Setup { key: Some("s3cret'".into()), ..setup() };
    for client in ALL {
        let (text, end) = (merged(client, "", &with_key).unwrap(), then(client, &with_key));
        let (in_file, in_shell) = (text.contains("s3cret"), end.contains("s3cret"));
        assert_eq!((in_file, in_shell), (client != Client::Codex, client == Client::Codex));
        assert!(!merged(client, "", &setup()).unwrap().contains("s3cret"));
    }
    assert!(merged(Client::Codex, "", &with_key).unwrap().contains("env_key = \"LOCAL_API_KEY\""));
    assert!(then(Client::Codex, &with_key).contains(r"LOCAL_API_KEY='s3cret'\''' codex"));
    let page = shown(Client::Claude, &with_key, Path::new("/f")).unwrap();
    assert!(page.contains(r"export ANTHROPIC_AUTH_TOKEN='s3cret'\'''"), "{page}");
    assert!(then(Client::Pi, &setup()).contains("pi --provider local --model flash\n"));
}

#[test]
fn a_small_context_leaves_room_for_the_prompt() {
    let output = |ctx| Setup { ctx, ..setup() }.output();
    assert_eq!([output(1), output(32_768), output(1_000_000)], [1, 10_922, 32_000]);
}

#[test]
fn files_are_made_kept_and_left() {
    for client in ALL {
        let home = tempfile::tempdir().unwrap();
        let path = file(client, home.path(), |_| None);
        assert_eq!(install(&path, client, &setup()).unwrap(), Outcome::New);
        let first = fs::read_to_string(&path).unwrap();
        assert_eq!(first, merged(client, "", &setup()).unwrap());
        assert_eq!(install(&path, client, &setup()).unwrap(), Outcome::Same);

        let changed = |ctx| install(&path, client, &Setup { ctx, ..setup() }).unwrap();
        let backups = [".bak", ".bak.1", ".bak.2"].map(|suffix| beside(&path, suffix));
        for (i, backup) in backups.iter().enumerate() {
            assert_eq!(changed(i as u32 + 1), Outcome::Changed(backup.clone()));
        }
        assert_eq!(fs::read_to_string(&backups[0]).unwrap(), first);
        let third = merged(client, &first, &Setup { ctx: 2, ..setup() }).unwrap();
        assert_eq!(fs::read_to_string(&backups[2]).unwrap(), third);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 4, "and no other file");
    }
}

#[test]
fn bad_files_are_left_alone() {
    let cases: [(Client, &[u8]); 7] = [
        (Client::Claude, b"{\"env\": "),
        (Client::Claude, b"{\"env\": []}"),
        (Client::Claude, b"[]"),
        (Client::Codex, b"model = \n"),
        (Client::Opencode, b"{\n  // mine\n  \"model\": \"x\",\n}"),
        (Client::Pi, b"{\"providers\": null}"),
        (Client::Pi, b"{\"a\": \"\xff\"}"),
    ];
    for (client, bytes) in cases {
        let home = tempfile::tempdir().unwrap();
        let path = file(client, home.path(), |_| None);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        let error = install(&path, client, &setup()).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
        assert_eq!(error.contains("comments"), client == Client::Opencode, "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}

#[cfg(unix)]
#[test]
fn links_and_permissions_stay() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let home = tempfile::tempdir().unwrap();
    let (real, link) = (home.path().join("real.json"), home.path().join("link.json"));
    install(&real, Client::Pi, &setup()).unwrap();
    assert_eq!(mode(&real), 0o600, "there may be a key in it");
    fs::set_permissions(&real, Permissions::from_mode(0o640)).unwrap();
    symlink(&real, &link).unwrap();
    let outcome = install(&link, Client::Pi, &Setup { ctx: 7, ..setup() }).unwrap();
    let Outcome::Changed(backup) = outcome else { panic!("{outcome:?}") };
    assert!(link.is_symlink());
    assert_eq!([mode(&real), mode(&backup)], [0o640, 0o640]);
    assert_eq!(
        json(&fs::read_to_string(&link).unwrap())["providers"]["local"]["models"][0]["contextWindow"],
        7
    );
}

#[test]
fn servers_say_their_context() {
    let plain = "HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{\"data\":[{\"max_model_len\":100000}]}";
    assert!(asked(plain, None).1.is_err(), "a length that is too small");
    let plain =
        "HTTP/1.1 200 OK\r\ncontent-length: 35\r\n\r\n{\"data\":[{\"max_model_len\":100000}]} and more";
    let (request, outcome) = asked(plain, Some("k"));
    assert_eq!(outcome.unwrap(), 100_000);
    assert!(request.starts_with("GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:"), "{request}");
    assert!(request.contains("\r\nAuthorization: Bearer k\r\n"), "{request}");

    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                   A\r\n{\"data\":[{\r\n19;x=y\r\n\"max_model_len\":100000}]} \r\n0\r\n\r\n";
    let (request, outcome) = asked(chunked, None);
    assert_eq!(outcome.unwrap(), 100_000);
    assert!(!request.contains("Authorization"), "{request}");

    let to_the_end = "HTTP/1.0 200 OK\r\n\r\n{\"data\":[{\"max_model_len\":5},{\"max_model_len\":6}]}";
    assert_eq!(asked(to_the_end, None).1.unwrap(), 5);
}

#[test]
fn servers_that_do_not() {
    let cases = [
        ("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "--key"),
        ("HTTP/1.1 503 Loading\r\n\r\n", "503"),
        ("SSH-2.0-x\r\n", "no HTTP server"),
        ("", "no HTTP server"),
        ("HTTP/1.1 200 OK\r\n\r\n{\"data\":[]}", "max_model_len"),
        ("HTTP/1.1 200 OK\r\n\r\n{\"data\":[{\"max_model_len\":-1}]}", "max_model_len"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "not whole"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", "not whole"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "not whole"),
    ];
    for (answer, why) in cases {
        let error = asked(answer, None).1.unwrap_err().to_string();
        assert!(error.contains(why), "{answer:?}: {error}");
    }
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(context(&format!("http://{unused}"), None), CONTEXT);
}
