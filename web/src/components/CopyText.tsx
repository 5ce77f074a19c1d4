import { ActionIcon, CopyButton } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './CopyText.module.css';
import { Icon } from './Icon';

/** Something to paste elsewhere, with a button that copies it. `copied`: what is copied where the text hides a secret. */
export function CopyText({
  text,
  copied: hidden,
  label,
}: {
  text: string;
  copied?: string | undefined;
  label: string;
}) {
  const { t } = useTranslation();
  return (
    <div className={css.box}>
      <pre className={css.text} tabIndex={0} aria-label={label}>
        {text}
      </pre>
      <CopyButton value={hidden ?? text}>
        {({ copied, copy }) => (
          <ActionIcon
            variant="subtle"
            color={copied ? 'fern' : 'gray'}
            onClick={copy}
            aria-label={copied ? t('app.copied') : `${t('app.copy')}: ${label}`}
            size="lg"
          >
            <Icon name={copied ? 'check' : 'copy'} />
          </ActionIcon>
        )}
      </CopyButton>
    </div>
  );
}
