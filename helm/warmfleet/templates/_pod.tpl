{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The pod of the Deployment. */}}

{{- define "warmfleet.pod" -}}
metadata:
  labels:
    {{- /* Neither versions nor the chart's name: a new one of those alone must not roll pods that hold GPUs. */}}
    {{- merge (include "warmfleet.selectorLabels" . | fromYaml) .Values.podLabels .Values.commonLabels | toYaml | nindent 4 }}
  annotations:
    {{- $own := dict "checksum/config" (include "warmfleet.environment" . | sha256sum) "kubectl.kubernetes.io/default-container" "warmfleet" }}
    {{- merge $own .Values.podAnnotations .Values.commonAnnotations | toYaml | nindent 4 }}
spec:
  serviceAccountName: {{ include "warmfleet.serviceAccountName" . | quote }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "warmfleet.graceSeconds" . }}
  {{- with include "warmfleet.pullSecrets" . }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . | quote }}
  {{- end }}
  {{- if .Values.gpu.enabled }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    {{- $own := dict "labelSelector" (dict "matchLabels" (include "warmfleet.selectorLabels" $ | fromYaml)) }}
    - {{ ternary . (merge $own .) (hasKey . "labelSelector") | toYaml | nindent 6 | trim }}
    {{- end }}
  {{- end }}
  {{- if and .Values.gpu.enabled .Values.gpu.dra.enabled }}
  resourceClaims:
    - name: gpu
      resourceClaimTemplateName: {{ include "warmfleet.claimName" . }}
  {{- end }}
  {{- if or .Values.model.initDownload .Values.extraInitContainers }}
  initContainers:
    {{- if .Values.model.initDownload }}
    - name: download
      args: [download]
      {{- include "warmfleet.container" . | nindent 6 }}
      resources:
        {{- include "warmfleet.withoutGpu" . | nindent 8 }}
      volumeMounts:
        {{- include "warmfleet.mounts" . | nindent 8 }}
    {{- end }}
    {{- with .Values.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: warmfleet
      args: [serve]
      {{- include "warmfleet.container" . | nindent 6 }}
      ports:
        - name: api
          containerPort: {{ .Values.ports.api }}
        - name: ops
          containerPort: {{ .Values.ports.ops }}
      {{- include "warmfleet.probes" . | nindent 6 }}
      resources:
        {{- include "warmfleet.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "warmfleet.mounts" . | nindent 8 }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "warmfleet.volumes" . | nindent 4 }}
{{- end -}}

{{/* What the service's container and the one that downloads have in common. */}}
{{- define "warmfleet.container" -}}
image: {{ include "warmfleet.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
envFrom:
  - configMapRef:
      name: {{ include "warmfleet.fullname" . }}
{{- if or .Values.model.tokenSecret.name .Values.otlpHeadersSecret.name .Values.extraEnv }}
env:
  {{- if .Values.model.tokenSecret.name }}
  - name: WARMFLEET_HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ .Values.model.tokenSecret.name | quote }}
        key: {{ .Values.model.tokenSecret.key | quote }}
  {{- end }}
  {{- if .Values.otlpHeadersSecret.name }}
  - name: WARMFLEET_OTLP_HEADERS
    valueFrom:
      secretKeyRef:
        name: {{ .Values.otlpHeadersSecret.name | quote }}
        key: {{ .Values.otlpHeadersSecret.key | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Resources of a container that computes nothing: the pod's, less the GPUs. */}}
{{- define "warmfleet.withoutGpu" -}}
{{- $all := include "warmfleet.resources" . | fromYaml -}}
{{- dict "requests" (pick $all.requests "cpu" "memory") "limits" (pick $all.limits "cpu" "memory") | toYaml -}}
{{- end -}}

{{/* Startup asks whether the fleet is warm, readiness whether it still is, liveness only whether somebody answers. */}}
{{- define "warmfleet.probes" -}}
startupProbe:
  httpGet: {path: /ready, port: ops}
  periodSeconds: {{ .Values.startupProbe.periodSeconds }}
  timeoutSeconds: {{ .Values.startupProbe.timeoutSeconds }}
  failureThreshold: {{ include "warmfleet.startupFailures" . }}
readinessProbe:
  httpGet: {path: /ready, port: ops}
  periodSeconds: {{ .Values.readinessProbe.periodSeconds }}
  timeoutSeconds: {{ .Values.readinessProbe.timeoutSeconds }}
  failureThreshold: {{ .Values.readinessProbe.failureThreshold }}
livenessProbe:
  httpGet: {path: /health, port: ops}
  periodSeconds: {{ .Values.livenessProbe.periodSeconds }}
  timeoutSeconds: {{ .Values.livenessProbe.timeoutSeconds }}
  failureThreshold: {{ .Values.livenessProbe.failureThreshold }}
{{- if .Values.preStopSeconds }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ .Values.preStopSeconds }}
{{- end }}
{{- end -}}

{{- define "warmfleet.mounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if .Values.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /run/secrets/warmfleet
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "warmfleet.volumes" -}}
- name: cache
  {{- if eq .Values.cache.type "emptyDir" }}
  emptyDir:
    sizeLimit: {{ .Values.cache.size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ ternary .Values.cache.existingClaim (printf "%s-cache" (include "warmfleet.fullname" .)) (eq .Values.cache.type "existingClaim") | quote }}
  {{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSize }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shmSize }}
{{- if .Values.apiKeys.existingSecret }}
{{- include "warmfleet.keyVolume" . | nindent 0 }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "warmfleet.keyVolume" -}}
- name: api-keys
  secret:
    secretName: {{ .Values.apiKeys.existingSecret | quote }}
    items:
      - {key: {{ .Values.apiKeys.key | quote }}, path: keys}
{{- end -}}
