import { bytes } from '@/lib/format';
import type { Me } from '@/types/api';
import { Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './Storage.module.css';

const KINDS = ['files', 'models', 'jobs'] as const;

/** What of the relay's disk is one's own, and how much of it may be. */
export function Storage({ storage }: { storage: NonNullable<Me['storage']> }) {
  const { t } = useTranslation();
  const { quota_bytes: quota, used_bytes: used } = storage;
  const whole = Math.max(quota ?? used, used, 1);
  const starts = KINDS.map((_, i) => KINDS.slice(0, i).reduce((sum, kind) => sum + storage[`${kind}_bytes`], 0));
  return (
    <>
      <Text fw={600}>
        {quota === null
          ? t('account.storageUsed', { used: bytes(used) })
          : t('account.storageOf', { used: bytes(used), quota: bytes(quota) })}
      </Text>
      <svg className={css.bar} viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
        {KINDS.map((kind, i) => (
          <rect
            key={kind}
            data-kind={kind}
            x={(100 * (starts[i] ?? 0)) / whole}
            width={(100 * storage[`${kind}_bytes`]) / whole}
            height={6}
          />
        ))}
      </svg>
      <ul className={css.legend}>
        {KINDS.map((kind) => (
          <li key={kind} data-kind={kind}>
            {t(`account.storage_${kind}`)} <span>{bytes(storage[`${kind}_bytes`])}</span>
          </li>
        ))}
      </ul>
      <Text size="xs" c="dimmed">
        {t('account.storageText')}
      </Text>
    </>
  );
}
