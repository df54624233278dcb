{{- define "marline.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "marline.labels" -}}
app.kubernetes.io/part-of: marline
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "marline.cni" -}}
securityContext:
  {{- include "marline.unprivileged" . | nindent 2 }}
  runAsUser: 0
  # It writes files of the node's.
  seLinuxOptions:
    type: spc_t
resources:
  requests: {cpu: 5m, memory: 16Mi}
volumeMounts:
  - {name: cni-conf, mountPath: /host/etc/cni/net.d}
  - {name: cni-bin, mountPath: /host/opt/cni/bin}
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
