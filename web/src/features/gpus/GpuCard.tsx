import { ago, bytes, clockTime } from '@/lib/format';
import { meQuery } from '@/features/session/queries';
import type { Gpu } from '@/types/api';
import { Anchor, Text, Title } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import type { ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import { Drain } from './Drain';
import css from './GpuCard.module.css';

type Status = 'ready' | 'draining' | 'training' | 'answering' | 'unreachable' | 'gone';

function statusOf(gpu: Gpu): Status {
  if (!gpu.alive) return 'gone';
  if (!gpu.reachable) return 'unreachable';
  if (gpu.draining) return 'draining';
  if (gpu.job) return 'training';
  return gpu.active_requests > 0 ? 'answering' : 'ready';
}

export function GpuCard({ gpu }: { gpu: Gpu }) {
  const { t, i18n } = useTranslation();
  const status = statusOf(gpu);
  const { device } = gpu;
  const admin = useQuery(meQuery).data?.admin === true;
  const facts: [string, ReactNode, ReactNode?][] = [
    [
      t('gpus.memory'),
      t('gpus.memoryFree', { free: bytes(gpu.free_bytes), total: bytes(device.memory_bytes) }),
      <svg key="bar" className={css.bar} viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
        <rect width={100} height={6} className={css.free} />
        <rect
          width={100 * (1 - Math.min(1, gpu.free_bytes / Math.max(1, device.memory_bytes)))}
          height={6}
          className={css.used}
        />
      </svg>,
    ],
    [
      t('gpus.precision'),
      device.precision,
      <Text key="why" size="xs" c="dimmed" lang="en">
        {device.precision_why}
      </Text>,
    ],
    [
      t('gpus.job'),
      gpu.job === null ? (
        t('gpus.idle')
      ) : gpu.job.id?.startsWith('batch_') ? (
        `${gpu.job.id.slice(0, 14)}…`
      ) : gpu.job.id ? (
        <Anchor component={Link} to={`/training/${gpu.job.id}`}>
          {gpu.job.id.slice(0, 14)}…
        </Anchor>
      ) : (
        t('gpus.othersJob')
      ),
    ],
    [t('gpus.requests'), gpu.active_requests],
    [
      t('gpus.tunnel'),
      i18n.exists(`gpus.tunnel_${gpu.tunnel}`) ? t(`gpus.tunnel_${gpu.tunnel}` as 'gpus.tunnel_none') : gpu.tunnel,
    ],
    ...(gpu.breaker === 'closed'
      ? []
      : [
          [t('gpus.breaker'), t(gpu.breaker === 'open' ? 'gpus.breaker_open' : 'gpus.breaker_half')] as [
            string,
            ReactNode,
          ],
        ]),
    ...(gpu.runtime_ends_at
      ? [[t('gpus.ends'), clockTime(gpu.runtime_ends_at, i18n.language)] as [string, ReactNode]]
      : []),
  ];
  return (
    <article className={css.card} data-status={status}>
      <div className={css.head}>
        <div>
          <Title order={2} size="h3">
            {gpu.name}
          </Title>
          <Text size="sm" c="dimmed">
            {device.name}
          </Text>
        </div>
        <div className={css.status}>
          <span className={css.dot} aria-hidden="true" />
          <span>{t(`gpus.status_${status}`)}</span>
          {gpu.alive ? null : (
            <span className={css.seen}>· {t('gpus.seen', { ago: ago(gpu.last_seen_at, i18n.language) })}</span>
          )}
        </div>
      </div>
      {gpu.alive ? (
        <dl className={css.facts}>
          {facts.map(([name, value, more]) => (
            <div key={name}>
              <dt>{name}</dt>
              <dd>
                {value}
                {more}
              </dd>
            </div>
          ))}
        </dl>
      ) : null}
      <ul className={css.models} aria-label={t('gpus.models')}>
        {gpu.models.map((model) => (
          <li key={model.id}>
            {model.id} <span>{model.loaded ? t('gpus.loaded') : t('gpus.onDisk')}</span>
          </li>
        ))}
      </ul>
      {admin && gpu.alive ? <Drain gpu={gpu} /> : null}
    </article>
  );
}
