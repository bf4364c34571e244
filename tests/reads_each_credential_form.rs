//! Each form of a credential file serves, is refreshed, and is written back in its own form with
//! everything in it that is not ours kept as it was.

mod common;
use common::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

/// Starts with `file` as the ChatGPT login and asks once: the access token and account that the upstream saw.
fn asked_with(up: &Upstream, file: &Value) -> (Mux, String, String) {
    let mux = Setup::bare(up).save("chatgpt", file).start();
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200, "{file}");
    let request = up.requests().pop().expect("a request");
    let account = request
        .head
        .get("chatgpt-account-id")
        .unwrap_or_default()
        .to_owned();
    (mux, request.bearer().to_owned(), account)
}

#[test]
fn claude_code() {
    let up = Upstream::plain();
    let login = up.login("claude", 3600);
    let mux = Setup::bare(&up).save("claude", &login.claude()).start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[0].bearer(), login.access);
}

#[test]
fn both_forms_of_chatgpt() {
    let up = Upstream::plain();
    let login = up.login("chatgpt", 3600);
    for file in [login.flat(), login.codex()] {
        let (_mux, access, account) = asked_with(&up, &file);
        assert_eq!(
            (access, account),
            (login.access.clone(), login.account.clone())
        );
    }
    assert_eq!(up.refreshes().len(), 0);
}

#[test]
fn what_the_file_leaves_out_is_read_from_the_token() {
    let up = Upstream::plain();
    let login = up.login("chatgpt", 3600);
    let mut flat = login.flat();
    flat.as_object_mut()
        .expect("an object")
        .retain(|key, _| key.ends_with("_token"));
    let mut codex = login.codex();
    codex["tokens"]
        .as_object_mut()
        .expect("an object")
        .remove("account_id");
    for file in [&flat, &codex] {
        let (_mux, access, account) = asked_with(&up, file);
        assert_eq!(
            (access, account),
            (login.access.clone(), login.account.clone())
        );
    }
    assert_eq!(
        up.refreshes().len(),
        0,
        "the token's own claim says that it is good"
    );

    let expired = up.login("chatgpt", -10);
    let mut file = expired.codex();
    file["tokens"]
        .as_object_mut()
        .expect("an object")
        .remove("account_id");
    let (_mux, access, account) = asked_with(&up, &file);
    assert_ne!(
        access, expired.access,
        "the token's own claim says that it has expired"
    );
    assert_eq!(account, expired.account);
    assert_eq!(up.refreshes().len(), 1);
}

/// Where the file and the token's claims say different things, the file's own fields hold.
#[test]
fn what_the_file_says_wins_over_the_tokens_claims() {
    let up = Upstream::plain();
    let mut login = up.login("chatgpt", -10); // as its token claims
    login.account = "acct-of-the-file".to_owned();
    login.expires = now() + 3600;
    up.accept(&login);
    let (_mux, access, account) = asked_with(&up, &login.flat());
    assert_eq!((access, account), (login.access, login.account));
    assert_eq!(up.refreshes().len(), 0);
}

/// With neither a field nor a claim the token serves until the upstream refuses it.
#[test]
fn a_token_that_does_not_say_when_it_expires_serves_until_a_401() {
    let up = Upstream::plain();
    let mut login = up.login("chatgpt", 3600);
    login.access = noise();
    up.accept(&login);
    let (mux, access, _) = asked_with(&up, &login.codex());
    assert_eq!(
        (access.as_str(), up.refreshes().len()),
        (login.access.as_str(), 0)
    );
    up.revoke(&login.access);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    assert_eq!(up.refreshes().len(), 1);
}

#[test]
fn a_time_is_in_seconds_or_milliseconds_and_keeps_its_unit() {
    for (unit, provider, ttl) in [
        (1000, "claude", 8 * 3600),
        (1, "claude", 8 * 3600),
        (1, "chatgpt", 8 * 3600),
        (1000, "chatgpt", 8 * 3600),
    ] {
        let up = Upstream::plain();
        let fresh = up.login(provider, 3600);
        let with = |login: &Login| {
            let (mut file, key) = match provider {
                "claude" => (login.claude(), "/claudeAiOauth/expiresAt"),
                _ => (login.flat(), "/expires_at"),
            };
            *file.pointer_mut(key).expect("a field") = json!(login.expires * unit);
            (file, key)
        };
        let target = target(provider);
        let mux = Setup::bare(&up).save(provider, &with(&fresh).0).start();
        assert_eq!(mux.ask("POST", target, &[], b"{}").status, 200);
        assert_eq!(up.refreshes().len(), 0, "{provider}, unit {unit}");

        let (mut file, key) = with(&up.login(provider, -10));
        if (unit == 1000) == (provider == "claude") {
            // Set by hand to have it refreshed: it has no unit but the form's own.
            *file.pointer_mut(key).expect("a field") = json!(0);
        }
        login::save(&mux.state(), provider, &file);
        let before = now();
        assert_eq!(mux.ask("POST", target, &[], b"{}").status, 200);
        assert_eq!(up.refreshes().len(), 1, "{provider}, unit {unit}");
        let saved = login::read(&mux.state(), provider);
        let expires = saved
            .pointer(key)
            .and_then(Value::as_u64)
            .expect("a number");
        let (object, _) = key.rsplit_once('/').expect("a field of an object");
        let keys = |of: &Value| {
            let fields = of.pointer(object).and_then(Value::as_object);
            fields.expect("fields").keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(keys(&saved), keys(&file), "none goes, none comes");
        let bounds = (before + ttl) * unit..=(now() + ttl + 1) * unit;
        assert!(
            bounds.contains(&expires),
            "{provider}, unit {unit}: {expires}"
        );
    }
}

#[test]
fn unknown_keys_and_siblings_survive_a_refresh() {
    let up = Upstream::plain();
    let old = up.login("claude", -10);
    let mut claude = old.claude();
    claude["claudeAiOauth"]["rateLimitTier"] = json!("default_claude_max_20x");
    claude["claudeAiOauth"]["unknown"] = json!({"z": [1, 2.5, null], "a": "é\u{1F600}\\\""});
    claude["mcpOAuth"] =
        json!({"server|x": {"clientSecret": "kept", "n": 12345678901234567890u64}});
    let codex = {
        let mut file = up.login("chatgpt", -10).codex();
        file["auth_mode"] = json!("chatgpt");
        file["tokens"]["other"] = json!([true]);
        file
    };
    let setup = Setup::bare(&up)
        .save("claude", &claude)
        .save("chatgpt", &codex);
    let mux = setup.start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);

    let mut saved = login::read(&mux.state(), "claude");
    for key in ["accessToken", "refreshToken", "expiresAt"] {
        assert_ne!(
            saved["claudeAiOauth"][key], claude["claudeAiOauth"][key],
            "{key}"
        );
        saved["claudeAiOauth"][key] = claude["claudeAiOauth"][key].clone();
    }
    assert_eq!(saved, claude);
    assert_eq!(
        saved.to_string(),
        claude.to_string(),
        "and the order of the keys"
    );

    let mut saved = login::read(&mux.state(), "chatgpt");
    for key in [
        "/tokens/access_token",
        "/tokens/refresh_token",
        "/tokens/id_token",
        "/last_refresh",
    ] {
        let was = codex.pointer(key).expect("a key").clone();
        let is = saved.pointer_mut(key).expect("a key");
        assert_ne!(*is, was, "{key}");
        *is = was;
    }
    assert_eq!(saved.to_string(), codex.to_string());
}

/// Codex rejects a file whose id_token is no JWT or whose last_refresh is no time.
#[test]
fn codex_can_read_what_is_written() {
    let up = Upstream::plain();
    let mux = Setup::bare(&up)
        .save("chatgpt", &up.login("chatgpt", -10).codex())
        .start();
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    let saved = login::read(&mux.state(), "chatgpt");
    let id_token = saved["tokens"]["id_token"].as_str().expect("a token");
    assert_eq!(id_token.split('.').count(), 3);
    let last = saved["last_refresh"].as_str().expect("a time");
    let time = humantime::parse_rfc3339(last).expect("RFC 3339");
    assert!(time.elapsed().is_ok_and(|age| age < 2 * PATIENCE), "{last}");
}

#[test]
fn a_linked_folder_and_a_linked_file_stay_links() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up);
    let (home, state) = (setup.folder.0.join("home"), setup.state());
    login::save(&home, "claude", &up.login("claude", -10).claude());
    login::save(&home, "chatgpt", &up.login("chatgpt", -10).codex());
    symlink(home.join("claude"), state.join("claude")).expect("link a folder");
    fs::create_dir(state.join("chatgpt")).expect("make a folder");
    let link = login::path(&state, "chatgpt");
    symlink(login::path(&home, "chatgpt"), &link).expect("link a file");
    let mux = setup.start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    assert_eq!(up.refreshes().len(), 2);
    assert!(state.join("claude").is_symlink() && link.is_symlink());
    let real = login::read(&home, "claude");
    assert_eq!(
        real["claudeAiOauth"]["accessToken"],
        json!(up.requests()[0].bearer())
    );
    let real = login::read(&home, "chatgpt");
    assert_eq!(
        real["tokens"]["access_token"],
        json!(up.requests()[1].bearer())
    );
    for folder in [
        home.join("claude"),
        home.join("chatgpt"),
        link.parent().expect("a folder").to_owned(),
    ] {
        assert_eq!(
            fs::read_dir(folder).expect("a folder").count(),
            1,
            "nothing is left beside the file"
        );
    }
}

#[test]
fn a_saved_file_is_private() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let path = login::path(&setup.state(), "claude");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    let mux = setup.start();
    mux.wait_log("WARN");
    assert_eq!(mux.message().status, 200);
    // Had it been written with a looser mode, the next request would have warned again.
    assert_eq!(mux.message().status, 200);
    let warnings = mux
        .log_lines("WARN")
        .into_iter()
        .filter(|line| line.contains(".credentials"));
    assert_eq!(warnings.count(), 1, "{}", mux.log());
    let mode = || fs::metadata(&path).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    for (told, loose) in [(2, 0o640), (3, 0o604)] {
        login::save(&mux.state(), "claude", &up.login("claude", 3600).claude());
        fs::set_permissions(&path, fs::Permissions::from_mode(loose)).expect("chmod");
        assert_eq!(mux.message().status, 200);
        assert_eq!(mode(), 0o600, "tightened without a refresh too");
        assert_eq!(up.refreshes().len(), 1);
        mux.wait_log_times("others could read it", told);
    }
}

/// On a file system that is read-only, say, or that has no modes.
#[test]
fn a_file_that_cannot_be_made_private_is_told() {
    for result in ["error=EROFS", "retval=0"] {
        let options =
            format!("-o /dev/null -e trace=?chmod,fchmodat -e inject=?chmod,fchmodat:{result}");
        let Some(script) = setup::under_strace(&options) else {
            return say("SKIPPED: needs strace");
        };
        let up = Upstream::plain();
        let setup = Setup::new(&up);
        let path = login::path(&setup.state(), "claude");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        let mux = setup.shell(&script).start();
        assert_eq!(mux.message().status, 200);
        mux.wait_log("others could read it");
        let said = mux.log_lines("others could read it");
        assert!(said[0].contains("644"), "{}", said[0]);
    }
}

/// What keeps a file small is kept as well: indented, this one would be too large to be read again.
#[test]
fn a_saved_file_has_not_grown() {
    let up = Upstream::plain();
    let mut file = up.login("claude", -10).claude();
    file["own"] = json!(vec![json!([1]); 60_000]);
    let setup = Setup::bare(&up).save("claude", &file);
    let path = login::path(&setup.state(), "claude");
    let compact = file.to_string();
    fs::write(&path, &compact).expect("write a file");
    let mux = setup.start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(mux.message().status, 200);
    let size = fs::metadata(&path).expect("a file").len();
    assert!(size < compact.len() as u64 + 1000, "{size} bytes");
}
