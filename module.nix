# The NixOS module: the options, then what is checked, then the unit.
# It works without the flake; nixosModules.default only adds the package that the flake pins.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  inherit (lib) mkIf mkOption types;
  cfg = config.services.ai-mux;
  inherit (cfg) settings;

  credential = name: "user-${name}";
  elsewhere =
    settings.state_dir != "/var/lib/ai-mux" && !lib.hasPrefix "/var/lib/ai-mux/" settings.state_dir;

  # [ host port ], or null for what is neither :PORT nor HOST:PORT.
  split = builtins.match "([A-Za-z0-9._-]*|\\[[0-9A-Za-z:.%_-]+]):([0-9]{1,5})";
  host = lib.head (split settings.listen);
  portOf = listen: lib.toIntBase10 (lib.last (split listen));
  port = portOf settings.listen;
  lowPort = port < 1024;
  capability = lib.optionalString lowPort "CAP_NET_BIND_SERVICE";
  isLoopback = host == "localhost" || host == "[::1]" || lib.hasPrefix "127." host;

  # The seconds of a duration, or null for what is none.
  seconds =
    duration:
    let
      number = "0*([0-9]+(\\.[0-9]+)?)"; # JSON knows no leading zeros
      parts = builtins.filter lib.isList (builtins.split "${number}(ms|s|m|h)" duration);
      inUnit = {
        ms = 0.001;
        s = 1;
        m = 60;
        h = 3600;
      };
    in
    if lib.isInt duration then
      duration
    else if builtins.match "(${number}(ms|s|m|h))+" duration == null then
      null
    else
      lib.foldl' (sum: part: sum + builtins.fromJSON (lib.head part) * inUnit.${lib.last part}) 0 parts;

  # The fallback lets the assertion speak of a host that is not declared.
  acme =
    config.security.acme.certs.${cfg.tls.useACMEHost} or {
      directory = "";
      group = "";
    };
  acmeUnits = lib.optional (cfg.tls.useACMEHost != null) "acme-${cfg.tls.useACMEHost}.service";

  # A narrower type, whose description is what an error message says would be right.
  narrow =
    type: description: check:
    types.addCheck type check // { inherit description; };
  matching = regex: text: builtins.match regex text != null;
  duration =
    narrow (types.either types.int types.str)
      ''duration up to 365 days: "60s", "10m", "1h30m", "1.5h", "500ms" or a whole number of seconds''
      (
        value:
        let
          length = seconds value;
        in
        length != null && length >= 0.001 && length <= 365 * 86400
      );
  upstream =
    narrow types.str ''URL that begins with "https://", or with "http://" and a loopback address''
      (
        matching "https://[^@?#[:space:]]+|http://(localhost|127(\\.[0-9]{1,3}){3}|\\[::1])([:/][^@?#[:space:]]*)?"
      );
  # One that is not in quotes would be copied to the store.
  path = narrow types.str "absolute path in quotes" (lib.hasPrefix "/");
  outsideStore = narrow (types.externalPath or path) "absolute path in quotes, not in the Nix store" (
    path: !lib.hasPrefix "${builtins.storeDir}/" "${path}/"
  );

  # A setting that is left to the program's own default.
  unset =
    type: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };
  withoutNull =
    value:
    if lib.isAttrs value then
      lib.mapAttrs (_: withoutNull) (lib.filterAttrs (_: v: v != null) value)
    else if lib.isList value then
      map withoutNull value
    else
      value;

  providerNames = types.enum [
    "claude"
    "chatgpt"
  ];
  provider = types.submodule {
    options = {
      name = mkOption {
        type = providerNames;
        description = "Which provider.";
      };
      headers = mkOption {
        type = types.attrsOf (narrow types.str "text of visible ASCII and spaces" (matching "[ -~\t]*"));
        default = { };
        description = "Set on every request to the provider, in place of the client's.";
      };
      base_url = unset upstream "Where requests go.";
      token_url = unset upstream "Where refreshes go.";
    };
  };

  # Where nixpkgs has no such package, this checkout builds its own.
  own = (import ./flake.nix).outputs {
    self = null;
    nixpkgs = { inherit lib; };
  };

  # Written as JSON, which is YAML that can be read in one way only.
  configFile = (pkgs.formats.json { }).generate "ai-mux.json" (withoutNull settings);
in
{
  options.services.ai-mux = {
    enable = lib.mkEnableOption "ai-mux, which lets your devices use your Claude or ChatGPT subscription";

    package = lib.mkPackageOption pkgs "ai-mux" { } // {
      default = pkgs.ai-mux or (own.overlays.default pkgs pkgs).ai-mux;
    };

    users = mkOption {
      type = types.attrsOf (
        types.submodule {
          options.tokenFile = mkOption {
            type = outsideStore;
            example = "/run/secrets/ai-mux-alice";
            description = ''
              File with the user's bearer token, at least 16 characters. systemd reads it as root and hands it to
              the service, so it may belong to root with mode 0400. A changed token is in use after a restart.
            '';
          };
        }
      );
      default = { };
      example = lib.literalExpression ''{ alice.tokenFile = "/run/secrets/ai-mux-alice"; }'';
      description = "Who may use ai-mux, beside {option}`services.ai-mux.settings.users`.";
    };

    tls = {
      certificate = mkOption {
        type = types.nullOr path;
        default = null;
        example = "/var/lib/certificates/ai-mux.pem";
        description = "Certificate chain, PEM, read in place: a renewed pair is in use within ten seconds.";
      };
      key = mkOption {
        type = types.nullOr outsideStore;
        default = null;
        example = "/var/lib/certificates/ai-mux.key";
        description = "Its private key, PEM. The service must be able to read it: see {option}`services.ai-mux.tls.group`.";
      };
      group = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "certificates";
        description = "A group that may read certificate and key, and enter their folders; the service joins it.";
      };
      useACMEHost = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "mux.example.org";
        description = "Serve with the certificate of this host from {option}`security.acme.certs`.";
      };
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Open the port of {option}`services.ai-mux.settings.listen` in the firewall.";
    };

    settings = mkOption {
      default = { };
      description = "The configuration file, as the README describes it.";
      type = types.submodule {
        freeformType = (pkgs.formats.yaml { }).type;
        options = {
          listen = mkOption {
            type =
              narrow types.str
                ''address: ":PORT" for every interface, or "HOST:PORT", with a port from 1 to 65535''
                (value: split value != null && portOf value >= 1 && portOf value <= 65535);
            default = ":8080";
            example = "127.0.0.1:8080";
            description = "`:PORT` for every interface, IPv4 and IPv6, or `HOST:PORT`.";
          };
          state_dir = mkOption {
            type =
              narrow outsideStore
                "absolute path of a folder for ai-mux alone, like /srv/ai-mux, in no folder of the system's: without white space, quotes, \\ or %"
                (
                  path:
                  matching "(/[^%\"'\\[:space:]/]+){2,}/?" path
                  && !matching ".*/[.]{1,2}(/.*)?|/(dev|etc|nix|proc|run|sys|usr)/.*|/var/[^/]+/?|/var/lib/private(/.*)?" path
                );
            default = "/var/lib/ai-mux";
            description = ''
              Where the logins are kept. A folder elsewhere than in /var/lib/ai-mux (not a link) is created, or taken
              over if it exists (what is in it keeps its owner); it belongs to a system user `ai-mux`.
            '';
          };
          log_level = unset (types.enum [
            "debug"
            "info"
            "warn"
            "error"
          ]) "How much is logged.";
          providers = mkOption {
            type = types.listOf (
              types.either providerNames provider
              // {
                description = ''"claude", "chatgpt", or an attribute set with one of them as name'';
              }
            );
            default = [ ];
            example = [
              "claude"
              {
                name = "chatgpt";
                headers.x-team = "home";
              }
            ];
            description = "Which providers to serve. If empty: those that have a login at the start; without any, the service keeps restarting.";
          };
          users = mkOption {
            type = types.listOf (
              types.submodule {
                options = {
                  name = mkOption {
                    type = narrow types.str "name without control characters" (
                      name: name != "-" && matching "[^[:cntrl:]]+" name
                    );
                    description = "The name in the log.";
                  };
                  token = unset types.str "The token. It lands in the world-readable store.";
                  token_file = unset outsideStore "A file that the service itself can read.";
                };
              }
            );
            default = [ ];
            description = "Prefer {option}`services.ai-mux.users`, which keeps the tokens out of the store.";
          };
          request_timeout = unset duration "Longest wait for a free worker, and from a request's end to its answer's head.";
          stream_idle_timeout = unset duration "The longest silence inside a response.";
          refresh_check_interval = unset duration "How often the logins are looked at; at least a second.";
          workers = unset (types.ints.between 1 65535) "Requests served at once.";
          proxy = unset (narrow types.str ''URL such as "http://HOST:PORT" or "socks5://HOST:PORT"'' (
            matching "(https?|socks(4a?|5h?)?)://[^[:space:]]+"
          )) "Proxy for everything sent upstream.";
          tls = mkOption {
            type = types.submodule {
              options = {
                enabled = unset types.bool "Serve HTTPS.";
                cert_path = unset path "Certificate chain, PEM.";
                key_path = unset outsideStore "Private key, PEM.";
              };
            };
            default = { };
            description = "Prefer {option}`services.ai-mux.tls`.";
          };
        };
      };
    };
  };

  config = mkIf cfg.enable {
    assertions =
      let
        quoted = lib.concatMapStringsSep ", " (name: ''"${name}"'');
        repeated = list: lib.unique (builtins.filter (x: lib.count (y: y == x) list > 1) list);
        given = builtins.filter (x: x != null);

        declared = builtins.attrNames (options.services.ai-mux.settings.type.getSubOptions [ ]);
        known = builtins.filter (name: !lib.hasPrefix "_" name) declared; # not the module system's own
        unknown = lib.subtractLists known (builtins.attrNames settings);

        providers = map (p: if lib.isAttrs p then p else { name = p; }) settings.providers;
        headers = lib.concatMap (p: builtins.attrNames (p.headers or { })) providers;
        # They say who asks, for whom, or where a message ends: that is for ai-mux alone.
        reserved = builtins.filter (
          name:
          lib.hasPrefix "proxy-" (lib.toLower name)
          || builtins.elem (lib.toLower name) [
            "authorization"
            "chatgpt-account-id"
            "connection"
            "content-length"
            "cookie"
            "expect"
            "host"
            "keep-alive"
            "te"
            "trailer"
            "transfer-encoding"
            "upgrade"
            "x-api-key"
          ]
        ) headers;
        malformed = builtins.filter (name: !matching "[A-Za-z0-9!#$%&'*+.^_`|~-]+" name) headers;

        sameName = repeated (map (user: user.name) settings.users);
        tokens = given (map (user: user.token) settings.users);
        tokenFiles =
          given (map (user: user.token_file) settings.users)
          ++ lib.mapAttrsToList (_: user: user.tokenFile) cfg.users;
        isFileName = matching "[A-Za-z0-9][A-Za-z0-9._@-]{0,63}";

        # ProtectHome= and PrivateTmp= put empty folders in the place of these.
        isHidden = matching "/(home|root|run/user|tmp|var/tmp)(/.*)?";
        paths = [
          settings.state_dir
          settings.tls.cert_path
          settings.tls.key_path
        ]
        ++ map (user: user.token_file) settings.users;
        hidden = builtins.filter isHidden (given paths);
      in
      # The message, and when it is due.
      lib.mapAttrsToList
        (message: due: {
          assertion = !due;
          message = "services.ai-mux.${message}";
        })
        {
          "settings: there is no setting ${quoted unknown}; there are ${quoted known}." = unknown != [ ];
          "settings: home and temporary folders are hidden from the service; move ${quoted hidden} to /var/lib." =
            hidden != [ ];
          "settings.providers: write each provider once, in its short or in its long form." =
            repeated (map (p: p.name) providers) != [ ];
          "settings.providers: remove ${quoted reserved} from headers; ai-mux sets or drops it itself." =
            reserved != [ ];
          "settings.providers: ${quoted malformed} cannot be the name of a header." = malformed != [ ];
          "settings.refresh_check_interval: write 1s or more." =
            settings.refresh_check_interval != null && seconds settings.refresh_check_interval < 1;

          "settings.users: give each user either token or token_file." = lib.any (
            user: (user.token == null) == (user.token_file == null)
          ) settings.users;
          "settings.users: a token has at least 16 characters of visible ASCII; `openssl rand -hex 20` makes one." =
            !lib.all (matching "[!-~]{16,}") tokens;
          "users: two users have the same token, or its file; give each a token of its own." =
            repeated (tokens ++ tokenFiles) != [ ];
          "users: two users are called ${quoted sameName}; give each a name of its own." = sameName != [ ];
          "users: a name begins with a letter or digit and has up to 64 of them and of . _ @ - since it names a file, too." =
            !lib.all isFileName (builtins.attrNames cfg.users);

          "tls: set both certificate and key, or neither." =
            (cfg.tls.certificate == null) != (cfg.tls.key == null);
          "tls: set either certificate and key, or useACMEHost." =
            cfg.tls.certificate != null && cfg.tls.useACMEHost != null;
          "tls.useACMEHost: declare this host in security.acme.certs, too." =
            cfg.tls.useACMEHost != null && !config.security.acme.certs ? ${cfg.tls.useACMEHost};
          "settings.tls: set enabled, too, or remove cert_path and key_path: without it there is no TLS." =
            settings.tls.enabled == null && (settings.tls.cert_path != null || settings.tls.key_path != null);
          "settings.tls: with enabled, set cert_path and key_path, too." =
            settings.tls.enabled == true && (settings.tls.cert_path == null || settings.tls.key_path == null);
        };

    warnings =
      lib.optional (lib.any (user: user.token != null) settings.users) ''
        services.ai-mux.settings.users: a token that is written there lands in the world-readable Nix store.
        Write it into a file instead, and the file's name here: services.ai-mux.users.<name>.tokenFile = "/run/secrets/…";
      ''
      ++ lib.optional (settings.proxy != null && lib.hasInfix "@" settings.proxy) ''
        services.ai-mux.settings.proxy: the password in it lands in the world-readable Nix store.
        Write HTTPS_PROXY=… into a file instead, and its name here: systemd.services.ai-mux.serviceConfig.EnvironmentFile = "/run/secrets/…";
      ''
      ++ lib.optional (settings.users == [ ] && !isLoopback) ''
        services.ai-mux: without users, whoever reaches ${settings.listen} uses your subscription.
        Write services.ai-mux.users.<name>.tokenFile = "/run/secrets/…"; or services.ai-mux.settings.listen = "127.0.0.1:${toString port}";
      ''
      ++ lib.optional (cfg.openFirewall && isLoopback) ''
        services.ai-mux.openFirewall: nothing but this machine reaches ${settings.listen}, whatever the firewall lets in.
      '';

    services.ai-mux.settings = {
      users = mkIf (cfg.users != { }) (
        lib.mapAttrsToList (name: _: {
          inherit name;
          token_file = "/run/credentials/ai-mux.service/${credential name}";
        }) cfg.users
      );
      tls =
        if cfg.tls.useACMEHost != null then
          {
            enabled = true;
            cert_path = "${acme.directory}/fullchain.pem";
            key_path = "${acme.directory}/key.pem";
          }
        else
          mkIf (cfg.tls.certificate != null) {
            enabled = true;
            cert_path = cfg.tls.certificate;
            key_path = cfg.tls.key;
          };
    };

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [ port ];

    # Elsewhere than under /var/lib/ai-mux no StateDirectory= makes the folder, and only a user with a lasting id can own it.
    users = mkIf elsewhere {
      users.ai-mux = {
        isSystemUser = true;
        group = "ai-mux";
      };
      groups.ai-mux = { };
    };
    systemd.tmpfiles.settings = mkIf elsewhere {
      ai-mux.${settings.state_dir}.d = {
        user = "ai-mux";
        group = "ai-mux";
        mode = "0700";
      };
    };

    systemd.services.ai-mux = {
      description = "ai-mux";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ] ++ acmeUnits;
      after = [ "network-online.target" ] ++ acmeUnits;
      unitConfig.RequiresMountsFor = lib.optional elsewhere settings.state_dir;
      serviceConfig = {
        Type = "exec";
        ExecStart = "${lib.getExe cfg.package} --config ${configFile}";
        LoadCredential = lib.mapAttrsToList (
          name: user: "${credential name}:${lib.replaceStrings [ "%" ] [ "%%" ] user.tokenFile}"
        ) cfg.users;

        Restart = "on-failure";
        RestartSec = 5;
        # A wrong configuration stays wrong, but a certificate may still come.
        RestartPreventExitStatus = mkIf (settings.tls.enabled != true) 2;
        TimeoutStopSec = 45; # requests have 10 s, and a second to be cut short; then a refresh 30 s to be saved
        LimitNOFILE = 65536; # the program may not raise it itself: see SystemCallFilter

        DynamicUser = true;
        SupplementaryGroups =
          lib.optional (cfg.tls.group != null) cfg.tls.group
          ++ lib.optional (cfg.tls.useACMEHost != null) acme.group;
        StateDirectory = mkIf (!elsewhere) "ai-mux";
        StateDirectoryMode = "0700";
        ReadWritePaths = lib.optional elsewhere settings.state_dir;
        UMask = "0077";

        AmbientCapabilities = capability;
        CapabilityBoundingSet = capability;
        PrivateUsers = !lowPort; # in a user namespace the capability would not count
        SocketBindDeny = "any";
        SocketBindAllow = [
          "tcp:${toString port}"
          "udp" # musl's resolver binds a UDP socket
        ];

        DevicePolicy = "closed";
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        NoNewPrivileges = true;
        PrivateDevices = true;
        PrivateIPC = true;
        PrivateMounts = true;
        PrivateTmp = true;
        ProcSubset = "pid";
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        ProtectSystem = "strict";
        RemoveIPC = true;
        RestrictAddressFamilies = "AF_INET AF_INET6 AF_UNIX";
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged"
          "~@resources"
        ];
      };
    };
  };
}
