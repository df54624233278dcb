{{- define "marline.image" -}}
{{ required "image.repository is not set: name the registry that the nodes pull Marline's image from, as --set image.repository=registry.example/marline" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "marline.labels" -}}
app.kubernetes.io/part-of: marline
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "marline.pins" -}}
{{ dig "capture" "pinPath" "/sys/fs/bpf/marline" .Values.agent.config }}
{{- end }}

{{- define "marline.cni" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsUser: 0
  capabilities:
    drop: [ALL]
    add:
      # The directories of a node's CNI may be another user's (of kubespray's `kube`, of whoever packed an archive): root alone cannot write there.
      - DAC_OVERRIDE
      # A configuration that is written anew stays that user's.
      - CHOWN
  seccompProfile:
    type: RuntimeDefault
  # It writes files of the node's.
  seLinuxOptions:
    type: spc_t
resources:
  requests: {cpu: 5m, memory: 16Mi}
volumeMounts:
  - {name: cni-conf, mountPath: /host/etc/cni/net.d}
  - {name: cni-bin, mountPath: /host/opt/cni/bin}
{{- end }}

{{- define "marline.unload" -}}
securityContext:
  {{- include "marline.unprivileged" . | nindent 2 }}
  runAsUser: 0
  # Pins are root's files, and no more is asked for their removal. As for the agent: both forbid /sys/fs/bpf by default.
  appArmorProfile:
    type: Unconfined
  seLinuxOptions:
    type: spc_t
resources:
  requests: {cpu: 5m, memory: 16Mi}
volumeMounts:
  - {name: bpf, mountPath: /sys/fs/bpf, mountPropagation: HostToContainer}
{{- end }}

{{- define "marline.unprivileged" -}}
# Root in name alone: no capability, no other privilege.
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}
