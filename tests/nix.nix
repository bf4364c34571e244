# module.nix and flake.nix evaluated with nothing but nixpkgs' lib, for tests/nix.sh:
#   broken   what does not hold of the right configurations and of the flake
#   wrong    configurations, each of which must not evaluate
#   messages what the error of each of them must say
#   units    the text of two units, for systemd-analyze
#   vm       the VM test's scripts
#   readme   a configuration that is handed in
{
  nixpkgsLib, # the folder
  secret, # a file that holds `secretText`
  secretText,
  config ? { }, # a configuration from the README
}:
let
  # Nix before 2.14 lacks the builtin that lib.fileset needs; Debian has 2.8.
  lib = (import nixpkgsLib).extend (
    _: before: {
      filesystem = before.filesystem // {
        pathType = builtins.readFileType or (path: (builtins.readDir (dirOf path)).${baseNameOf path});
      };
    }
  );
  inherit (lib) mkOption types;
  option =
    type: default:
    mkOption {
      inherit type default;
    };
  any = option (types.attrsOf types.anything) { };
  words = option (types.listOf types.str) [ ];

  # The NixOS options that the module sets.
  nixos.options = {
    assertions = option (types.listOf types.raw) [ ];
    warnings = words;
    networking.firewall.allowedTCPPorts = option (types.listOf types.port) [ ];
    security.acme.certs = option (types.attrsOf (
      types.submodule (
        { name, ... }: {
          options = {
            directory = option types.str "/var/lib/acme/${name}";
            group = option types.str "acme";
          };
        }
      )
    )) { };
    systemd.tmpfiles.settings = any;
    systemd.services = option (types.attrsOf (
      types.submodule {
        options = {
          description = option types.str "";
          after = words;
          before = words;
          wants = words;
          wantedBy = words;
          requiredBy = words;
          environment = any;
          unitConfig = any;
          serviceConfig = any;
          path = option (types.listOf types.raw) [ ];
          script = option types.lines "";
        };
      }
    )) { };
    users.users = any;
    users.groups = any;
  };

  package = attributes: {
    type = "derivation";
    outPath = "/nix/store/00000000000000000000000000000000-${attributes.pname}";
    inherit (attributes) pname meta;
    version = attributes.version or "0";
    given = attributes;
  };
  # Formats write their value out in place of a file name, so that a test can read it.
  pkgsOf =
    system:
    let
      pkgs = {
        inherit lib;
        stdenv.hostPlatform = {
          inherit system;
          isLinux = lib.hasSuffix "-linux" system;
        };
        formats.json = _: { generate = _: builtins.toJSON; };
        formats.yaml = _: { type = types.attrsOf types.anything; };
        rustPlatform.buildRustPackage = package;
        callPackage = f: _: f (builtins.intersectAttrs (lib.functionArgs f) pkgs);
        pkgsStatic = pkgs // {
          callPackage = f: args: pkgs.callPackage f args // { static = true; };
        };
        mkShell =
          attributes:
          package {
            pname = "shell";
            meta = { };
          }
          // attributes;
        writeText = _: text: text;
        testers.runNixOSTest =
          test:
          package {
            pname = "vm-test";
            meta = { };
          }
          // {
            inherit test;
          };
      }
      //
        lib.genAttrs
          [
            "clippy"
            "deadnix"
            "nixfmt-tree"
            "openssl"
            "python3"
            "rust-analyzer"
            "rustfmt"
          ]
          (
            pname:
            package {
              inherit pname;
              meta.mainProgram = pname;
            }
          );
    in
    pkgs;

  evaluate =
    modules:
    (lib.evalModules {
      modules = [
        nixos
        { _module.args.pkgs = lib.mkDefault (pkgsOf "x86_64-linux"); }
      ]
      ++ modules;
    }).config;

  # A configuration, what it becomes, and the two things that matter most of it.
  outcome =
    modules:
    let
      config = evaluate ([ ../module.nix ] ++ modules);
      failed = map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
      unit = config.systemd.services.ai-mux.serviceConfig;
    in
    if failed != [ ] then
      throw (lib.concatStringsSep "\n" failed)
    else
      {
        inherit config unit;
        inherit (config) warnings;
        file = builtins.fromJSON (lib.last (lib.splitString " --config " unit.ExecStart));
        # Everything that would be evaluated into the store.
        text = builtins.toJSON [
          config.systemd
          config.warnings
        ];
      };

  documented = {
    services.ai-mux = {
      enable = true;
      settings = {
        listen = ":8080";
        state_dir = "/var/lib/ai-mux";
        providers = [
          "claude"
          "chatgpt"
        ];
        users = [
          {
            name = "alice";
            token = "alice-secret-token-at-least-16";
          }
        ];
      };
    };
  };
  enabled = services: {
    services.ai-mux = services // {
      enable = true;
    };
  };
  withSettings =
    settings:
    enabled {
      settings = {
        listen = "127.0.0.1:8080";
      }
      // settings;
    };
  acme = {
    security.acme.certs."mux.example.org" = { };
  };
  low = [
    (enabled {
      settings.listen = "[::]:443";
      tls.useACMEHost = "mux.example.org";
      users.alice.tokenFile = "/run/secrets/alice";
      openFirewall = true;
    })
    acme
  ];
  plain = [ (enabled { users.alice.tokenFile = secret; }) ];

  right = {
    documented = {
      modules = [ documented ];
      holds = o: {
        "it is written as it stands" = o.file == documented.services.ai-mux.settings // { tls = { }; };
        "the token in the store is warned of" = map (lib.hasInfix "tokenFile") o.warnings == [ true ];
        "the unit names binary and configuration" =
          lib.hasInfix "-ai-mux/bin/ai-mux --config " o.unit.ExecStart;
        "a port over 1023 needs no capability" =
          o.unit.CapabilityBoundingSet == "" && o.unit.AmbientCapabilities == "" && o.unit.PrivateUsers;
        "no other TCP port can be bound" =
          o.unit.SocketBindAllow == [
            "tcp:8080"
            "udp"
          ]
          && o.unit.SocketBindDeny == "any";
        "the firewall is left alone" = o.config.networking.firewall.allowedTCPPorts == [ ];
        "no user is made" = o.config.users.users == { };
        "what stays wrong is not tried again" = o.unit.RestartPreventExitStatus == 2;
      };
    };
    "nothing but enable" = {
      modules = [ (enabled { }) ];
      holds = o: {
        "the file holds the defaults that the unit relies on" =
          o.file == {
            listen = ":8080";
            state_dir = "/var/lib/ai-mux";
            providers = [ ];
            users = [ ];
            tls = { };
          };
        "an open door is warned of" = map (lib.hasInfix "127.0.0.1:8080") o.warnings == [ true ];
        "without the flake it builds its own package" = lib.hasInfix "-ai-mux/bin/ai-mux " o.unit.ExecStart;
      };
    };
    "a package of nixpkgs" = {
      modules = [
        (enabled { })
        {
          _module.args.pkgs = pkgsOf "x86_64-linux" // {
            ai-mux = package {
              pname = "theirs";
              meta.mainProgram = "theirs";
            };
          };
        }
      ];
      holds = o: { "is taken" = lib.hasInfix "-theirs/bin/theirs " o.unit.ExecStart; };
    };
    "not enabled" = {
      modules = [
        {
          services.ai-mux.users.alice.tokenFile = "/run/secrets/alice";
          services.ai-mux.openFirewall = true;
        }
      ];
      holds = o: {
        "nothing is set" =
          o.config.systemd.services == { } && o.config.networking.firewall.allowedTCPPorts == [ ];
      };
    };
    "a user's token file" = {
      modules = plain;
      holds = o: {
        "systemd hands it over" = o.unit.LoadCredential == [ "user-alice:${secret}" ];
        "the configuration names what systemd hands over" =
          o.file.users == [
            {
              name = "alice";
              token_file = "/run/credentials/ai-mux.service/user-alice";
            }
          ];
        "it is there, and its text nowhere" =
          lib.hasInfix secretText (builtins.readFile secret) && !lib.hasInfix secretText o.text;
        "nothing is warned of" = o.warnings == [ ];
      };
    };
    "users in both places" = {
      modules = [
        documented
        (enabled { users."bob@phone".tokenFile = "/run/50%"; })
      ];
      holds = o: {
        "are all there" =
          lib.sort lib.lessThan (map (u: u.name) o.file.users) == [
            "alice"
            "bob@phone"
          ];
        "a percent sign stays one" = o.unit.LoadCredential == [ "user-bob@phone:/run/50%%" ];
      };
    };
    "port 443 with ACME" = {
      modules = low;
      holds = o: {
        "the port is opened" = o.config.networking.firewall.allowedTCPPorts == [ 443 ];
        "and may be bound" = lib.elem "tcp:443" o.unit.SocketBindAllow;
        "by one capability" =
          o.unit.CapabilityBoundingSet == "CAP_NET_BIND_SERVICE"
          && o.unit.AmbientCapabilities == "CAP_NET_BIND_SERVICE"
          && !o.unit.PrivateUsers;
        "the certificate is read in place" =
          o.file.tls == {
            enabled = true;
            cert_path = "/var/lib/acme/mux.example.org/fullchain.pem";
            key_path = "/var/lib/acme/mux.example.org/key.pem";
          };
        "with its group" = o.unit.SupplementaryGroups == [ "acme" ];
        "one that comes late is waited for" = !o.unit ? RestartPreventExitStatus;
        "after it was made" =
          lib.elem "acme-mux.example.org.service" o.config.systemd.services.ai-mux.after;
        "nothing is warned of" = o.warnings == [ ];
      };
    };
    "a certificate of one's own" = {
      modules = [
        (enabled {
          settings.listen = "localhost:8443";
          openFirewall = true;
          tls = {
            certificate = "/var/lib/c/cert.pem";
            key = "/var/lib/c/key.pem";
            group = "c";
          };
        })
      ];
      holds = o: {
        "is read in place" =
          o.file.tls == {
            enabled = true;
            cert_path = "/var/lib/c/cert.pem";
            key_path = "/var/lib/c/key.pem";
          };
        "with its group" = o.unit.SupplementaryGroups == [ "c" ];
        "a hole in the firewall that leads nowhere is warned of" =
          map (lib.hasInfix "openFirewall") o.warnings == [ true ];
      };
    };
    "the state elsewhere" = {
      modules = [ (withSettings { state_dir = "/srv/mux"; }) ];
      holds = o: {
        "may be written" = o.unit.ReadWritePaths == [ "/srv/mux" ];
        "is the only one" = !o.unit ? StateDirectory;
        "is mounted first" =
          o.config.systemd.services.ai-mux.unitConfig.RequiresMountsFor == [ "/srv/mux" ];
        "is made for a user that lasts" =
          o.config.systemd.tmpfiles.settings.ai-mux."/srv/mux".d == {
            user = "ai-mux";
            group = "ai-mux";
            mode = "0700";
          }
          && o.config.users.users.ai-mux.isSystemUser;
      };
    };
    "the state in a folder below" = {
      modules = [ (withSettings { state_dir = "/var/lib/ai-mux/home"; }) ];
      holds = o: { "needs nothing more" = o.unit.ReadWritePaths == [ ] && o.config.users.users == { }; };
    };
    "a duration with leading zeros" = {
      modules = [ (withSettings { request_timeout = "01h05.50s"; }) ];
      holds = o: { "is taken" = o.file.request_timeout == "01h05.50s"; };
    };
    "an address with a zone" = {
      modules = [ (withSettings { listen = "[fe80::1%eth0]:8080"; }) ];
      holds = o: { "is taken" = o.file.listen == "[fe80::1%eth0]:8080"; };
    };
    "every setting" = {
      modules = [ (withSettings everySetting) ];
      holds = o: {
        "is written as it stands" =
          o.file == {
            listen = "127.0.0.1:8080";
            state_dir = "/var/lib/ai-mux";
          }
          // everySetting;
        "a password in the proxy's address is warned of" =
          map (lib.hasInfix "proxy") o.warnings == [ true ];
      };
    };
  };
  everySetting = {
    log_level = "debug";
    providers = [
      "chatgpt"
      {
        name = "claude";
        headers.x-team = "1e5";
        base_url = "http://[::1]:9000/x";
        token_url = "https://token.example.org/";
      }
    ];
    users = [
      {
        name = "carol";
        token_file = "/var/lib/tokens/carol";
      }
    ];
    request_timeout = "1h30m";
    stream_idle_timeout = "1.5h";
    refresh_check_interval = 1;
    workers = 4;
    proxy = "socks5h://me:password@proxy.example.org:1080";
    tls = {
      enabled = false;
      cert_path = "/nix/store/x";
    };
  };

  # Each with words that the error must have.
  wrongCases =
    let
      refused = says: modules: { inherit says modules; };
      setting = says: settings: refused says [ (withSettings settings) ];
      claude = says: more: setting says { providers = [ ({ name = "claude"; } // more) ]; };
      user = says: more: setting says { users = [ ({ name = "alice"; } // more) ]; };
      option = says: services: refused says [ (enabled services) ];
      inStore = "${package {
        pname = "secret";
        meta = { };
      }}";
    in
    {
      "no such setting" = setting ''no setting "lisen"; there are "listen"'' { lisen = ":1"; };
      "no such setting of a provider" = claude "url" { url = "x"; };
      "no such setting of a user" = user "pass" { pass = "x"; };
      "no such setting of tls" = setting "cert" { tls.cert = "/x"; };

      "no port" = setting ''":PORT" for every interface, or "HOST:PORT"'' { listen = "localhost"; };
      "a bare port" = setting ''":PORT"'' { listen = "8080"; };
      "port 0" = setting "port from 1 to 65535" { listen = ":0"; };
      "port 65536" = setting "port from 1 to 65535" { listen = ":65536"; };
      "IPv6 without brackets" = setting ''"HOST:PORT"'' { listen = "::1:8080"; };
      "the state in two words" = setting "without white space" { state_dir = "/srv/my mux"; };
      "the state with a specifier" = setting "without white space" { state_dir = "/srv/%h"; };
      "the state by ~" = setting "absolute path" { state_dir = "~/.ai-mux"; };
      "the state in the root's folder" = setting "for ai-mux alone" { state_dir = "/srv"; };
      "the state in everyone's folder" = setting "for ai-mux alone" { state_dir = "/var/lib"; };
      "the state by detours" = setting "for ai-mux alone" { state_dir = "/srv/mux/../.."; };
      "the state in the store" = setting "for ai-mux alone" { state_dir = "/nix/store"; };
      "the state among the system's" = setting "for ai-mux alone" { state_dir = "/etc/ssh"; };
      "the state in marks" = setting "without white space, quotes" { state_dir = "/srv/o'mux"; };
      "the state at home" = setting ''move "/home/mux" to /var/lib'' { state_dir = "/home/mux"; };
      "no such log level" = setting ''"debug", "info", "warn", "error"'' { log_level = "verbose"; };
      "no workers" = setting "between 1 and 65535" { workers = 0; };
      "a proxy without scheme" = setting "socks5://HOST:PORT" { proxy = "proxy.example.org:1080"; };

      "a duration in words" = setting ''duration up to 365 days: "60s"'' {
        request_timeout = "5 minutes";
      };
      "a duration of nothing" = setting ''duration up to 365 days: "60s"'' {
        stream_idle_timeout = "0s";
      };
      "a duration of years" = setting ''duration up to 365 days: "60s"'' { request_timeout = "8761h"; };
      "a negative duration" = setting ''duration up to 365 days: "60s"'' { stream_idle_timeout = -1; };
      "too short an interval" = setting "write 1s or more" { refresh_check_interval = "999ms"; };

      "no such provider" = setting ''"claude", "chatgpt", or'' { providers = [ "gemini" ]; };
      "no such provider, long" = claude ''one of "claude", "chatgpt"'' { name = "gemini"; };
      "a provider twice" = setting "each provider once" {
        providers = [
          "claude"
          { name = "claude"; }
        ];
      };
      "a reserved header" = claude ''remove "Authorization"'' { headers.Authorization = "x"; };
      "a header of proxies" = claude ''remove "Proxy-Any"'' { headers.Proxy-Any = "x"; };
      "no header at all" = claude "cannot be the name of a header" { headers."x y" = "x"; };
      "a header of two lines" = claude "visible ASCII and spaces" { headers.x = "a\nb"; };
      "a password in an upstream" = claude ''begins with "https://"'' {
        base_url = "https://me:password@api.example.org";
      };
      "an upstream of two lines" = claude ''begins with "https://"'' {
        base_url = "https://api.example.org\n";
      };
      "plain http" = claude ''begins with "https://"'' { base_url = "http://api.example.org"; };
      "plain http, in short" = claude ''begins with "https://"'' { base_url = "http://127.1:9"; };
      "plain http, nearly local" = claude ''begins with "https://"'' {
        token_url = "http://localhost.example.org";
      };

      "a short token" = user "at least 16 characters" { token = "fifteen-letters"; };
      "no token" = user "either token or token_file" { };
      "token and file" = user "either token or token_file" {
        token = "sixteen-letters-";
        token_file = "/x";
      };
      "one token for two" = setting "the same token" {
        users =
          map
            (name: {
              inherit name;
              token = "sixteen-letters-";
            })
            [
              "alice"
              "bob"
            ];
      };
      "one token file for two" = option "the same token, or its file" {
        users.alice.tokenFile = "/run/secrets/x";
        users.bob.tokenFile = "/run/secrets/x";
      };
      "one name for two" = refused ''two users are called "alice"'' [
        documented
        (enabled { users.alice.tokenFile = "/x"; })
      ];
      "a name that no file can have" = option "up to 64 of them" { users."a/b".tokenFile = "/x"; };
      "a token with a space" = user "visible ASCII" { token = "sixteen letters-"; };
      "a user of no name" = user "name without control" {
        name = "";
        token = "sixteen-letters-";
      };
      "a token file in the store" = option "not in the Nix store" { users.alice.tokenFile = inStore; };
      "a token file somewhere" = option "absolute path" { users.alice.tokenFile = "secrets/a"; };
      "a token file without quotes" = option "path in quotes" { users.alice.tokenFile = /x; };
      "a certificate without quotes" = option "path in quotes" {
        tls.certificate = /x;
        tls.key = "/x";
      };

      "a certificate without key" = option "both certificate and key" { tls.certificate = "/x"; };
      "a key without certificate" = option "both certificate and key" { tls.key = "/x"; };
      "a key in the store" = option "not in the Nix store" { tls.key = inStore; };
      "two certificates" = refused "either certificate and key, or useACMEHost" [
        (enabled { tls.certificate = "/x"; })
        (enabled { tls.key = "/x"; })
        (enabled { tls.useACMEHost = "mux.example.org"; })
        acme
      ];
      "no such ACME host" = option "declare this host" { tls.useACMEHost = "mux.example.org"; };
      "TLS without files" = setting "set cert_path and key_path" { tls.enabled = true; };
      "TLS files without TLS" = setting "or remove cert_path and key_path" { tls.cert_path = "/x"; };
      "a certificate at home" = setting ''move "/root/c.pem" to /var/lib'' {
        tls.cert_path = "/root/c.pem";
      };
    };

  # The flake, with a stand-in for its one input.
  flake =
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "aarch64-darwin"
      ];
      self = (import ../flake.nix).outputs {
        inherit self;
        nixpkgs = {
          inherit lib;
          legacyPackages = lib.genAttrs systems pkgsOf;
        };
      };
    in
    self;
  lock = lib.importJSON ../flake.lock;
  cargo = lib.importTOML ../Cargo.toml;
  built = flake.packages.x86_64-linux.default;
  vm = flake.checks.x86_64-linux.nixos.test;
  flakeHolds = {
    "its outputs" =
      lib.mapAttrs (_: lib.mapAttrs (_: v: if lib.isFunction v then "function" else builtins.attrNames v))
        {
          inherit (flake)
            packages
            apps
            devShells
            checks
            nixosModules
            overlays
            ;
        } == {
        packages = {
          x86_64-linux = [
            "default"
            "static"
          ];
          aarch64-linux = [
            "default"
            "static"
          ];
          aarch64-darwin = [ "default" ];
        };
        apps = lib.genAttrs (builtins.attrNames flake.packages) (_: [ "default" ]);
        devShells = lib.genAttrs (builtins.attrNames flake.packages) (_: [ "default" ]);
        checks = {
          x86_64-linux = [
            "nixos"
            "package"
            "static"
          ];
          aarch64-linux = [
            "nixos"
            "package"
            "static"
          ];
          aarch64-darwin = [ "package" ];
        };
        nixosModules.default = "function";
        overlays.default = "function";
      };
    "the version is cargo's" = built.version == cargo.package.version;
    "the description is cargo's" = (import ../flake.nix).description == cargo.package.description;
    "the package runs its tests, which read /proc, on Linux alone" =
      lib.mapAttrs (_: packages: packages.default.given.doCheck) flake.packages == {
        x86_64-linux = true;
        aarch64-linux = true;
        aarch64-darwin = false;
      };
    "the package has its sources" = lib.hasPrefix builtins.storeDir "${built.given.src}";
    "the static one is static" = flake.packages.aarch64-linux.static.static;
    "the app is the program" =
      lib.hasSuffix "-ai-mux/bin/ai-mux" flake.apps.x86_64-linux.default.program;
    "the shell can build the package" = flake.devShells.x86_64-linux.default.inputsFrom == [ built ];
    "the formatter" = flake.formatter.x86_64-linux.pname == "nixfmt-tree";
    "the overlay brings the package" =
      (flake.overlays.default (pkgsOf "x86_64-linux") { }).ai-mux.pname == "ai-mux";
    "the module brings the package, which may be replaced" =
      let
        chosen = more: (evaluate ([ flake.nixosModules.default ] ++ more)).services.ai-mux.package;
        mine = package {
          pname = "mine";
          meta = { };
        };
      in
      chosen [ ] == built
      && chosen [ flake.nixosModules.default ] == built # imported a second time
      && chosen [ { services.ai-mux.package = mine; } ] == mine;
    "the VM test's machines are right configurations" = lib.all (
      node: node.text != "" && node.warnings == [ ]
    ) (builtins.attrValues machines.nodes);
    "the lock is the input's" =
      (import ../flake.nix).inputs.nixpkgs.url
      == "github:${lock.nodes.nixpkgs.original.owner}/${lock.nodes.nixpkgs.original.repo}/${lock.nodes.nixpkgs.original.ref}";
  };

  # The VM test's machines, on options so lax that only what ai-mux itself is given is checked.
  machines =
    let
      evaluated = lib.evalModules {
        modules = vm.imports ++ [
          {
            options = {
              name = option types.str "";
              testScript = option types.str "";
              defaults = option types.deferredModule { };
              nodes = option (types.lazyAttrsOf types.deferredModule) { };
            };
          }
        ];
      };
    in
    {
      inherit (evaluated.config) testScript;
      nodes = lib.mapAttrs (
        _: node:
        outcome [
          node
          { options.environment = any; }
        ]
      ) evaluated.config.nodes;
    };

  render =
    unit:
    "[Service]\n"
    + lib.concatStrings (
      lib.mapAttrsToList (
        name: value:
        lib.concatMapStrings (v: "${name}=${if lib.isBool v then lib.boolToString v else toString v}\n") (
          lib.toList value
        )
      ) unit
    );
in
{
  messages = lib.mapAttrs (_: case: case.says) wrongCases;
  wrong = lib.mapAttrs (_: case: outcome case.modules) wrongCases;
  broken =
    lib.concatLists (
      lib.mapAttrsToList (
        case:
        { modules, holds }:
        map (what: "${case}: ${what}") (
          builtins.attrNames (lib.filterAttrs (_: held: !held) (holds (outcome modules)))
        )
      ) right
    )
    ++ map (what: "flake: ${what}") (builtins.attrNames (lib.filterAttrs (_: held: !held) flakeHolds));
  units = lib.mapAttrs (_: modules: render (outcome modules).unit) { inherit plain low; };
  vm = {
    inherit (machines) testScript;
    vendor = lib.removePrefix "${lib.getExe (pkgsOf "x86_64-linux").python3} " machines.nodes.plain.config.systemd.services.vendor.serviceConfig.ExecStart;
  };
  readme =
    (outcome [
      config
      acme
    ]).text;
}
